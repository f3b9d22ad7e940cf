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
{{- if .root.Values.tls.clientCaSecretName -}}
exec:
  command:
    - python
    - -c
    - {{ .root.Files.Get "files/probe.py" | toJson }}
    - {{ int .root.Values.port | quote }}
    - {{ .path }}
{{- else -}}
httpGet: {path: {{ .path }}, port: http{{ if .root.Values.tls.secretName }}, scheme: HTTPS{{ end }}}
{{- end }}
{{ toYaml .settings }}
{{- end -}}

{{- /* Convert a quantity of bytes to whole MiB. */ -}}
{{- define "shoal.mebibytes" -}}
{{- $units := dict "" 9.5367431640625e-07 "Ki" 0.0009765625 "Mi" 1.0 "Gi" 1024.0 "Ti" 1048576.0 -}}
{{- mulf (regexFind "^[0-9.]+" . | float64) (get $units (regexFind "[A-Za-z]*$" .)) | ceil | int64 -}}
{{- end -}}

{{- /* A replica's resources. ephemeral-storage defaults to what the replica may write to the node's disk. */ -}}
{{- define "shoal.resources" -}}
{{- $resources := deepCopy .Values.resources -}}
{{- $requests := default dict $resources.requests -}}
{{- if not (hasKey $requests "ephemeral-storage") -}}
{{- $store := ternary "0" (include "shoal.mebibytes" .Values.storeSizeLimit) .Values.persistence.enabled -}}
{{- $sum := add 1024 (int64 $store) (int64 (include "shoal.mebibytes" .Values.temporarySizeLimit)) -}}
{{- $_ := set $requests "ephemeral-storage" (printf "%dMi" $sum) -}}
{{- end -}}
{{- $_ := set $resources "requests" $requests -}}
{{- toYaml $resources -}}
{{- end -}}

{{- define "shoal.ports" -}}
- {name: http, port: {{ int .Values.port }}, targetPort: http}
{{- with .Values.grpcPort }}
- {name: grpc, port: {{ int . }}, targetPort: grpc}
{{- end }}
{{- end -}}
