// Tests only: nothing of this is part of the plugin. What these need in turn follows from them, and v0.31.sum holds it.
module kmsplugin/test/kube/compat

go 1.26.0

require (
	k8s.io/apimachinery v0.31.14
	k8s.io/apiserver v0.31.14
)
