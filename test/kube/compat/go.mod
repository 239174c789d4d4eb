// The modules are in v*.mod, which cluster.sh takes. Go wants a file of this name, too.
module kmsplugin/test/kube/compat

go 1.26.0
