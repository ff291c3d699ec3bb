{{- /* Print the objects that Kustomize rendered for the chosen variant, as a JSON object: KIND/NAME has one object. */ -}}
{{- define "rendered" -}}
{{- $store := .Values.store }}
{{- $files := list (printf "%s%s" $store.kind (ternary "-tls" "" (and $store.tls (ne $store.kind "outside")))) }}
{{- if eq .Values.expose "nodePort" }}{{ $files = append $files "node-port" }}{{ end }}
{{- if .Values.monitoring.enabled }}{{ $files = append $files "monitoring" }}{{ end }}
{{- $objects := dict }}
{{- range $files }}
{{- range splitList "\n---\n" ($.Files.Get (printf "manifests/%s.yaml" .)) }}
{{- $object := fromYaml . }}
{{- $_ := set $objects (printf "%s/%s" $object.kind $object.metadata.name) $object }}
{{- end }}
{{- end }}
{{- toJson $objects }}
{{- end }}

{{- /* Print the names of the services, as a JSON array in `names`. */ -}}
{{- define "services" -}}
{{- $names := list }}
{{- range include "rendered" . | fromJson }}
{{- if eq .kind "Deployment" }}{{ $names = append $names .metadata.name }}{{ end }}
{{- end }}
{{- toJson (dict "names" $names) }}
{{- end }}

{{- /* Apply the values that concern images to a pod, in place. Usage: include "images" (list $ POD IMAGE) */ -}}
{{- define "images" -}}
{{- $values := (index . 0).Values }}{{ $pod := index . 1 }}{{ $image := index . 2 }}
{{- range $pod.containers }}
{{- $copy := ternary (printf "%s/%s" (trimSuffix "/" $values.registry) (base .image)) .image (ne $values.registry "") }}
{{- $_ := set . "image" ($image | default $copy) }}
{{- end }}
{{- with $values.imagePullSecrets }}{{ $_ := set $pod "imagePullSecrets" . }}{{ end }}
{{- end }}

{{- /* Add annotations to metadata, in place. Usage: include "annotate" (list METADATA ANNOTATIONS) */ -}}
{{- define "annotate" -}}
{{- $metadata := index . 0 }}
{{- $_ := set $metadata "annotations" (mergeOverwrite ($metadata.annotations | default dict) (index . 1)) }}
{{- end }}
