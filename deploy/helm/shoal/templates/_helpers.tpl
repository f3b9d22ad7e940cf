{{- define "shoal.fullname" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- /* The name of a shard's objects; of the only one, the release's. Takes (dict "root" $ "shard" NUMBER). */ -}}
{{- define "shoal.name" -}}
{{- $name := include "shoal.fullname" .root -}}
{{- if gt (int .root.Values.shards) 1 -}}{{- printf "%s-%d" $name (int .shard) -}}{{- else -}}{{- $name -}}{{- end -}}
{{- end -}}

{{- define "shoal.releaseSelector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "shoal.selector" -}}
{{ include "shoal.releaseSelector" .root }}
shoal/shard: {{ int .shard | quote }}
{{- end -}}

{{- define "shoal.releaseLabels" -}}
{{ include "shoal.releaseSelector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "shoal.labels" -}}
{{ include "shoal.releaseLabels" .root }}
shoal/shard: {{ int .shard | quote }}
{{- end -}}

{{- define "shoal.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "shoal.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "shoal.leastReplicas" -}}
{{- if .Values.autoscaling.enabled -}}{{ int .Values.autoscaling.minReplicas }}{{- else -}}{{ int .Values.replicas }}{{- end -}}
{{- end -}}

{{- define "shoal.probe" -}}
httpGet: {path: {{ .path }}, port: http{{ if .root.Values.tls.secretName }}, scheme: HTTPS{{ end }}}
{{ toYaml .settings }}
{{- end -}}

{{- define "shoal.ports" -}}
- {name: http, port: {{ int .Values.port }}, targetPort: http}
{{- with .Values.grpcPort }}
- {name: grpc, port: {{ int . }}, targetPort: grpc}
{{- end }}
{{- end -}}
