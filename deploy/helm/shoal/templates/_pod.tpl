{{- /* The pod of a shard's replicas. Takes (dict "root" $ "shard" NUMBER). */ -}}
{{- define "shoal.pod" -}}
{{- $values := .root.Values -}}
{{- if not (or $values.tokens.secretName $values.openToAll) -}}
{{- fail "nobody is told who may ask: set tokens.secretName, or openToAll if the network lets in only who may" -}}
{{- end -}}
{{- if and $values.tls.clientCaSecretName (not (and $values.tls.secretName $values.tls.clientSecretName)) -}}
{{- fail "tls.clientCaSecretName is set: the server needs tls.secretName, and the probes tls.clientSecretName" -}}
{{- end -}}
{{- $image := printf "%s:%s" $values.image.repository (default .root.Chart.AppVersion $values.image.tag) -}}
metadata:
  labels:
    {{- include "shoal.labels" . | nindent 4 }}
    {{- with $values.podLabels }}{{ toYaml . | nindent 4 }}{{ end }}
  {{- with $values.podAnnotations }}
  annotations: {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  serviceAccountName: {{ include "shoal.serviceAccount" .root }}
  {{- with $values.imagePullSecrets }}
  imagePullSecrets: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $values.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  # preStop, requests under way, the writer's last commit, and a little.
  terminationGracePeriodSeconds: {{ add (int $values.preStopSeconds) (int $values.drainSeconds) 15 }}
  securityContext: {{- toYaml $values.podSecurityContext | nindent 4 }}
  initContainers:
    # What was compiled with the image, to where what has to be compiled anew can be kept beside it.
    - name: kernels
      image: {{ $image }}
      imagePullPolicy: {{ $values.image.pullPolicy }}
      command: [cp, -r, /opt/shoal/kernels/., /var/cache/shoal]
      resources:
        requests: {cpu: 100m, memory: 64Mi}
        limits: {memory: 64Mi}
      securityContext: {{- toYaml $values.securityContext | nindent 8 }}
      volumeMounts:
        - {name: kernels, mountPath: /var/cache/shoal}
  containers:
    - name: shoal
      image: {{ $image }}
      imagePullPolicy: {{ $values.image.pullPolicy }}
      command: [shoal, serve]
      args:
        - --store=/var/lib/shoal/store
        - --from={{ required "root is not set: name the export root, s3://BUCKET/PREFIX or a mounted directory" $values.root }}
        - --poll={{ $values.pollSeconds }}
        - --host=0.0.0.0
        - --port={{ int $values.port }}
        {{- with $values.grpcPort }}
        - --grpc-port={{ int . }}
        {{- end }}
        - --workers={{ int $values.workers }}
        {{- if gt (int $values.shards) 1 }}
        - --shard={{ int .shard }}/{{ int $values.shards }}
        {{- end }}
        - --request-timeout-ms={{ int $values.requestTimeoutMs }}
        - --drain-seconds={{ $values.drainSeconds }}
        - --ready-lag-seconds={{ $values.readyLagSeconds }}
        {{- with $values.readyUnseenSeconds }}
        - --ready-unseen-seconds={{ . }}
        {{- end }}
        - --scrub-hours={{ $values.scrubHours }}
        {{- if $values.tokens.secretName }}
        - --tokens=/etc/shoal/tokens/tokens
        {{- else }}
        - --open-to-all
        {{- end }}
        {{- if $values.protectMetrics }}
        - --protect-metrics
        {{- end }}
        {{- if $values.tls.secretName }}
        - --tls-certificate=/etc/shoal/tls/tls.crt
        - --tls-key=/etc/shoal/tls/tls.key
        {{- end }}
        {{- if $values.tls.clientCaSecretName }}
        - --tls-client-ca=/etc/shoal/client-ca/ca.crt
        {{- end }}
        {{- with $values.extraArgs }}{{ toYaml . | nindent 8 }}{{ end }}
      env:
        - {name: NUMBA_CACHE_DIR, value: /var/cache/shoal}
        - {name: TMPDIR, value: /var/tmp/shoal}
        {{- with $values.env }}{{ toYaml . | nindent 8 }}{{ end }}
      {{- with $values.envFrom }}
      envFrom: {{- toYaml . | nindent 8 }}
      {{- end }}
      ports:
        - {name: http, containerPort: {{ int $values.port }}}
        {{- with $values.grpcPort }}
        - {name: grpc, containerPort: {{ int . }}}
        {{- end }}
      startupProbe:
        {{- include "shoal.probe" (dict "root" .root "path" "/health" "settings" $values.probes.startup) | nindent 8 }}
      readinessProbe:
        {{- include "shoal.probe" (dict "root" .root "path" "/ready" "settings" $values.probes.readiness) | nindent 8 }}
      livenessProbe:
        {{- include "shoal.probe" (dict "root" .root "path" "/health" "settings" $values.probes.liveness) | nindent 8 }}
      lifecycle:
        preStop:
          exec: {command: [sleep, {{ int $values.preStopSeconds | quote }}]}
      resources: {{- include "shoal.resources" .root | nindent 8 }}
      securityContext: {{- toYaml $values.securityContext | nindent 8 }}
      volumeMounts:
        - {name: store, mountPath: /var/lib/shoal}
        - {name: kernels, mountPath: /var/cache/shoal}
        - {name: temporary, mountPath: /var/tmp/shoal}
        {{- if $values.tokens.secretName }}
        - {name: tokens, mountPath: /etc/shoal/tokens, readOnly: true}
        {{- end }}
        {{- if $values.tls.secretName }}
        - {name: tls, mountPath: /etc/shoal/tls, readOnly: true}
        {{- end }}
        {{- if $values.tls.clientCaSecretName }}
        - {name: client-ca, mountPath: /etc/shoal/client-ca, readOnly: true}
        - {name: client, mountPath: /etc/shoal/client, readOnly: true}
        {{- end }}
        {{- with $values.extraVolumeMounts }}{{ toYaml . | nindent 8 }}{{ end }}
  volumes:
    {{- if not $values.persistence.enabled }}
    - {name: store, emptyDir: {sizeLimit: {{ $values.storeSizeLimit }}}}
    {{- end }}
    - {name: kernels, emptyDir: {sizeLimit: 1Gi}}
    - {name: temporary, emptyDir: {sizeLimit: {{ $values.temporarySizeLimit }}}}
    {{- with $values.tokens.secretName }}
    - {name: tokens, secret: {secretName: {{ . }}, defaultMode: 0440}}
    {{- end }}
    {{- with $values.tls.secretName }}
    - {name: tls, secret: {secretName: {{ . }}, defaultMode: 0440}}
    {{- end }}
    {{- with $values.tls.clientCaSecretName }}
    - {name: client-ca, secret: {secretName: {{ . }}, items: [{key: ca.crt, path: ca.crt}], defaultMode: 0440}}
    - {name: client, secret: {secretName: {{ $values.tls.clientSecretName }}, defaultMode: 0440}}
    {{- end }}
    {{- with $values.extraVolumes }}{{ toYaml . | nindent 4 }}{{ end }}
  {{- if $values.topologySpread }}
  topologySpreadConstraints:
    {{- range $values.topologySpread }}
    - {{- toYaml . | nindent 6 }}
      labelSelector:
        matchLabels: {{- include "shoal.selector" $ | nindent 10 }}
    {{- end }}
  {{- end }}
  {{- with $values.nodeSelector }}
  nodeSelector: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $values.tolerations }}
  tolerations: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $values.affinity }}
  affinity: {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end -}}
