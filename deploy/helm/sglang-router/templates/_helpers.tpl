{{- define "router.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "router.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" -}}
{{- else if contains (include "router.name" .) .Release.Name -}}
{{- .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "router.name" .) | trunc 63 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* The full name with a word after it, within the 63 characters of a name: (list $ "metrics"). */}}
{{- define "router.named" -}}
{{- $word := index . 1 -}}
{{- printf "%s-%s" (include "router.fullname" (index . 0) | trunc (int (sub 62 (len $word))) | trimSuffix "-") $word -}}
{{- end -}}

{{/* The name of what stands in the workers' namespace, where routers of other namespaces may have theirs: (list $ "").
The second: a word after it. */}}
{{- define "router.nameAtWorkers" -}}
{{- $root := index . 0 -}}
{{- $name := include "router.fullname" $root -}}
{{- if ne (include "router.workersNamespace" $root) $root.Release.Namespace -}}
{{- $name = printf "%s-%s" $root.Release.Namespace $name -}}
{{- end -}}
{{- with index . 1 -}}
{{- $name = printf "%s-%s" ($name | trunc (int (sub 62 (len .))) | trimSuffix "-") . -}}
{{- end -}}
{{- $name -}}
{{- end -}}

{{- define "router.selectorLabels" -}}
app.kubernetes.io/name: {{ include "router.name" . | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end -}}

{{- define "router.labels" -}}
{{ include "router.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service | quote }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | quote }}
{{- end -}}

{{- define "router.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "router.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "router.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}
{{ .repository }}@{{ .digest }}
{{- else -}}
{{ .repository }}:{{ default $.Chart.AppVersion .tag }}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* The namespace of the pods that are workers. */}}
{{- define "router.workersNamespace" -}}
{{- default .Release.Namespace .Values.discovery.namespace -}}
{{- end -}}

{{/* The InferencePool whose pods are workers; "" for none. */}}
{{- define "router.pool" -}}
{{- if eq .Values.mode "epp" -}}
{{- if .Values.epp.pool.create -}}
{{- default (include "router.fullname" .) .Values.epp.pool.name -}}
{{- else -}}
{{- .Values.epp.pool.name -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* The configuration file: what the values say, then `config`, which counts more. */}}
{{- define "router.config" -}}
{{- $config := dict "port" 30000 "prometheus-port" 29000 -}}
{{- $_ := set $config "shutdown-drain-secs" .Values.drainSeconds -}}
{{- $_ := set $config "shutdown-grace-period-secs" .Values.gracePeriodSeconds -}}
{{- if eq .Values.mode "epp" -}}
{{- $_ := set $config "epp-port" 9002 -}}
{{- if .Values.epp.tls.secret -}}
{{- $_ := set $config "epp-tls-cert-path" "/etc/sglang-router/epp-tls/tls.crt" -}}
{{- $_ := set $config "epp-tls-key-path" "/etc/sglang-router/epp-tls/tls.key" -}}
{{- end -}}
{{- end -}}
{{- $pool := include "router.pool" . -}}
{{- with .Values.discovery -}}
{{- if $pool -}}
{{- $_ := set $config "inference-pool" (printf "%s/%s" $.Release.Namespace $pool) -}}
{{- else if .enabled -}}
{{- $_ := set $config "service-discovery" true -}}
{{- $_ := set $config "service-discovery-port" .port -}}
{{- if not .allNamespaces -}}
{{- $_ := set $config "service-discovery-namespace" (include "router.workersNamespace" $) -}}
{{- end -}}
{{- if or .prefillSelector .decodeSelector -}}
{{- $_ := set $config "pd-disaggregation" true -}}
{{- $_ := set $config "prefill-selector" .prefillSelector -}}
{{- $_ := set $config "decode-selector" .decodeSelector -}}
{{- else -}}
{{- $_ := set $config "selector" .selector -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if .Values.keys.clients.secret -}}
{{- $_ := set $config "api-key-file" (printf "/etc/sglang-router/clients/%s" .Values.keys.clients.key) -}}
{{- end -}}
{{- if .Values.keys.operators.secret -}}
{{- $_ := set $config "control-plane-api-keys-file" (printf "/etc/sglang-router/operators/%s" .Values.keys.operators.key) -}}
{{- end -}}
{{- if .Values.tls.secret -}}
{{- $_ := set $config "tls-cert-path" "/etc/sglang-router/tls/tls.crt" -}}
{{- $_ := set $config "tls-key-path" "/etc/sglang-router/tls/tls.key" -}}
{{- end -}}
{{- with .Values.sharedState -}}
{{- if and .secret .fleetKey -}}
{{- $_ := set $config "shared-state-key" (printf "/etc/sglang-router/fleet/%s" .fleetKey) -}}
{{- end -}}
{{- end -}}
{{- if .Values.engineScaling.enabled -}}
{{- $_ := set $config "autoscale" (printf "%d:%d" (int .Values.engineScaling.min) (int .Values.engineScaling.max)) -}}
{{- end -}}
{{- toYaml (merge (deepCopy .Values.config) $config) -}}
{{- end -}}

{{/* HTTP or HTTPS, as the configuration says. */}}
{{- define "router.scheme" -}}
{{- $config := include "router.config" . | fromYaml -}}
{{- ternary "HTTPS" "HTTP" (hasKey $config "tls-cert-path") -}}
{{- end -}}

{{/* What to ask a probe: (list $ "liveness"). A picker is asked by gRPC, unless it speaks TLS there, which the kubelet cannot. */}}
{{- define "router.probe" -}}
{{- $root := index . 0 -}}
{{- $config := include "router.config" $root | fromYaml -}}
{{- $grpc := semverCompare ">=1.24-0" $root.Capabilities.KubeVersion.Version -}}
{{- if and (eq $root.Values.mode "epp") $grpc (not (hasKey $config "epp-tls-cert-path")) -}}
grpc: {port: {{ index $config "epp-port" | int }}, service: {{ index . 1 }}}
{{- else -}}
httpGet: {path: /{{ index . 1 }}, port: http, scheme: {{ include "router.scheme" $root }}}
{{- end -}}
{{- end -}}

{{- define "router.desired" -}}
max(sgl_router_desired_workers{namespace="{{ .Release.Namespace }}",service="{{ include "router.named" (list . "metrics") }}"})
{{- end -}}
