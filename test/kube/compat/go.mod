// The modules are in v*.mod: go test -modfile=v0.37.mod. Go wants a file of this name, too.
module kmsplugin/test/kube/compat

go 1.26.0
