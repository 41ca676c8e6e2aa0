{{/* What values.schema.json cannot say: values that are possible, but not together. */}}
{{- define "router.checks" -}}
{{- $name := include "router.fullname" . -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $name) -}}
{{- fail (printf "the objects would be named %q; the name of a Service is of a-z, 0-9 and -, and begins with a letter: set fullnameOverride" $name) -}}
{{- end -}}

{{- range $option, $instead := (include "router.elsewhere" . | fromYaml) -}}
{{- if hasKey $.Values.config $option -}}
{{- fail (printf "config.%s cannot be set here: %s" $option $instead) -}}
{{- end -}}
{{- end -}}

{{- $places := list "host" "port" "prometheus-host" "prometheus-port" "epp-host" "epp-port" "config" -}}
{{- range .Values.extraArgs -}}
{{- if has (. | trimPrefix "--" | splitList "=" | first) $places -}}
{{- fail (printf "extraArgs: %s cannot be set here, because probes and Services would not follow: use listen, and config.port or its like" .) -}}
{{- end -}}
{{- end -}}
{{- range .Values.extraEnv -}}
{{- if has (.name | trimPrefix "SGLANG_ROUTER_" | lower | replace "_" "-") $places -}}
{{- fail (printf "extraEnv: %s cannot be set here, because probes and Services would not follow: use listen, and config.port or its like" .name) -}}
{{- end -}}
{{- end -}}

{{- with .Values.rollout -}}
{{- if and (has (toString .maxSurge) (list "0" "0%")) (has (toString .maxUnavailable) (list "0" "0%")) -}}
{{- fail "rollout.maxSurge and rollout.maxUnavailable are both 0, so no pod could be replaced: let one of them be more" -}}
{{- end -}}
{{- end -}}

{{- with .Values.autoscaling -}}
{{- if .enabled -}}
{{- if gt (int .minReplicas) (int .maxReplicas) -}}
{{- fail "autoscaling.minReplicas is more than autoscaling.maxReplicas" -}}
{{- end -}}
{{- if not (dig "requests" "cpu" "" $.Values.resources) -}}
{{- fail "autoscaling needs resources.requests.cpu: its target is a percentage of that" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- with .Values.engineScaling -}}
{{- if .enabled -}}
{{- if gt (int .min) (int .max) -}}
{{- fail "engineScaling.min is more than engineScaling.max" -}}
{{- end -}}
{{- if and (eq .by "hpa") (ne (include "router.workersNamespace" $) $.Release.Namespace) -}}
{{- fail "engineScaling.by=hpa: a HorizontalPodAutoscaler reads metrics of its own namespace only. Install the router in the engines' namespace, or use keda" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- $pool := include "router.pool" . -}}
{{- with .Values.discovery -}}
{{- if and .enabled (ne (empty .prefillSelector) (empty .decodeSelector)) -}}
{{- fail "discovery.prefillSelector and discovery.decodeSelector belong together: a request goes to one worker of each kind" -}}
{{- end -}}
{{- $makes := and $pool $.Values.epp.pool.create -}}
{{- if and (or $makes (and .enabled (not $pool))) (not (or .selector .prefillSelector)) -}}
{{- fail "discovery.selector is empty: which pods are workers?" -}}
{{- end -}}
{{- if and $pool (or .allNamespaces (not (has .namespace (list "" $.Release.Namespace)))) -}}
{{- fail "an InferencePool has the pods of its own namespace, and its picker beside it: leave discovery.namespace and discovery.allNamespaces out" -}}
{{- end -}}
{{- end -}}

{{- if and .Values.rbac.create (or .Values.discovery.enabled $pool) (not .Values.serviceAccount.create) (not .Values.serviceAccount.name) -}}
{{- fail "serviceAccount.name is missing: the right to read pods would go to the account `default`, which every pod of the namespace may have" -}}
{{- end -}}

{{- if eq .Values.mode "epp" -}}
{{- if or .Values.discovery.prefillSelector .Values.discovery.decodeSelector -}}
{{- fail "mode=epp: a picker names one worker for a request, and pairs need two: leave discovery.prefillSelector and discovery.decodeSelector out" -}}
{{- end -}}
{{- if index .Values.config "relay-processes" -}}
{{- fail "mode=epp: a picker is one process: leave config.relay-processes out" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Options that must not be in the ConfigMap, and where they belong. */}}
{{- define "router.elsewhere" -}}
host: "see listen"
prometheus-host: "see listen"
epp-host: "see listen"
api-key: "it is a secret, and a ConfigMap is none; see keys.clients"
control-plane-api-keys: "it is a secret, and a ConfigMap is none; see keys.operators"
shared-state: "it may hold a password, and a ConfigMap is no secret; see sharedState"
{{- range list "worker-api-key" "scale-webhook" "scale-webhook-secret" "scale-command" "oracle-connect-descriptor" "oracle-password" "postgres-db-url" "redis-url" }}
{{ . }}: {{ printf "it is a secret or may hold one, and a ConfigMap is none; set SGLANG_ROUTER_%s in extraEnv from a Secret" (upper . | replace "-" "_") | quote }}
{{- end }}
{{- end -}}
