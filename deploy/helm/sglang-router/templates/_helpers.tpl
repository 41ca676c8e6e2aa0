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

{{- define "router.selectorLabels" -}}
app.kubernetes.io/name: {{ include "router.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "router.labels" -}}
{{ include "router.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | quote }}
{{- end -}}

{{- define "router.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "router.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* The namespace of the pods that are workers. */}}
{{- define "router.workersNamespace" -}}
{{- default .Release.Namespace .Values.discovery.namespace -}}
{{- end -}}

{{/* The configuration file: what the values say, then `config`, which counts more. */}}
{{- define "router.config" -}}
{{- $config := dict "port" 30000 "prometheus-port" 29000 -}}
{{- $_ := set $config "shutdown-drain-secs" .Values.drainSeconds -}}
{{- $_ := set $config "shutdown-grace-period-secs" .Values.gracePeriodSeconds -}}
{{- with .Values.discovery -}}
{{- if .enabled -}}
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

{{- define "router.scheme" -}}
{{- ternary "HTTPS" "HTTP" (not (empty .Values.tls.secret)) -}}
{{- end -}}

{{- define "router.desired" -}}
max(sgl_router_desired_workers{namespace="{{ .Release.Namespace }}",service="{{ include "router.fullname" . }}-metrics"})
{{- end -}}
