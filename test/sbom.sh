#!/bin/sh
# The bill of materials of make sbom: is it true of the program and the sources that lie here, the same twice, and does
# the schema of CycloneDX hold (by a package of PyPI, in a folder of its own)? A line `ok`, `not ok` or `skip` for each
# test.
set -eu
cd "$(dirname "$0")/.."
MAKE=${MAKE:-make}

# shellcheck source=test/lib.sh
. test/lib.sh
label='sbom: '

truth() {
    python3 - "$bom" "$(uname -m)" <<'X'
import hashlib, json, re, subprocess, sys
bom, sources = json.load(open(sys.argv[1])), 'build/src/'
sha256 = lambda path: hashlib.sha256(open(path, 'rb').read()).hexdigest()
told = subprocess.run(['build/static/kmsplugin', '--version'], capture_output=True, text=True, check=True).stdout
told = dict(line.lower().split() for line in told.splitlines())
main = bom['metadata']['component']
assert main['version'] == told.pop('kmsplugin') and main['hashes'][0]['content'] == sha256('build/static/kmsplugin')
components = {c['name']: c for c in bom['components'] if c['type'] == 'library'}
files = {c['name']: c['hashes'][0]['content'] for c in bom['components'] if c['type'] == 'file'}
assert set(components) == {'musl', *told}, components
assert files == ({'release/string.c': sha256('release/string.c')} if sys.argv[2] == 'x86_64' else {})
for name, version in told.items(): # a Debian version is the upstream one and more
    assert re.match(re.escape(version) + r'[-+]', components[name]['version']), (name, version)
archives = {r['url']: r['hashes'][0]['content'] for c in components.values() for r in c['externalReferences']}
have = {line.split()[1] for line in open(f'build/static/{sys.argv[2]}/SHA256SUMS')}
assert set(archives) == have and all(sha256(sources + f) == digest for f, digest in archives.items())
for name, c in components.items():
    (dsc,) = [f for f in have if f.startswith(name + '_') and f.endswith('.dsc')]
    assert re.search(r'^Version: (?:\d+:)?(.*)$', open(sources + dsc).read(), re.M)[1] == c['version']
refs = {main['bom-ref'], *(c['bom-ref'] for c in bom['components'])}
(dependency,) = bom['dependencies']
assert {dependency['ref'], *dependency['dependsOn']} == refs and len(refs) == 5 + len(files)
print(*(f'{n} {c["version"]}' for n, c in components.items()), sep=', ')
X
}

schema() {
    "$venv/bin/python" - "$bom" <<'X'
import sys
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
wrong = JsonStrictValidator(SchemaVersion.V1_5).validate_str(open(sys.argv[1]).read())
print(wrong)
sys.exit(wrong is not None)
X
}

version=$("$MAKE" -s version)
bom=build/sbom/kmsplugin-$version.cdx.json
require 'make sbom' "$MAKE" -s sbom || exit 0
cp "$bom" "$tmp/first.json"
check 'again, at another time' sh -c "sleep 1.1; rm '$bom' && TZ=Asia/Tokyo '$MAKE' -s sbom"
check 'the same bytes twice' cmp "$tmp/first.json" "$bom"
check 'versions and hashes are those of what lies here' truth
tail -n 1 "$tmp/output"

# What is not musl's though musl has it: as the link map tells, as README and doc/security.md tell.
replaced() {
    python3 - "build/static/$(uname -m)/lib/libc.a" <<'X'
import re, subprocess, sys
names = lambda *of: set(re.findall(r' [TWDVBi] (\w+)$', subprocess.run(['nm', '-g', '--defined-only', *of], capture_output=True, text=True, check=True).stdout, re.M))
musl, ours, where = names(sys.argv[1]), set(), None
for line in open('build/static/kmsplugin.map').read().split('Linker script and memory map')[1].splitlines():
    if file := re.search(r' 0x[0-9a-f]+ +0x[0-9a-f]+ (\S+)$', line):
        where = file[1]
    elif (name := re.fullmatch(r' +0x[0-9a-f]+ +(\w+)', line)) and name[1] in musl and not re.search(r'libc\.a\(|crt\w*\.o$', where):
        ours.add(name[1])
for path in 'README', 'doc/security.md':
    told = re.search(r'its own ([\w, ]+) in musl.s place', ' '.join(open(path).read().split()))[1]
    assert set(re.findall(r'\w+', told)) - {'and'} == ours, (path, told, ours)
print(*sorted(ours))
X
}
if [ "$(uname -m)" = x86_64 ]; then check "in musl's place is what the text names" replaced; fi

venv=build/sbom/venv
if [ -x "$venv/bin/pip" ] || python3 -m venv "$venv" >/dev/null 2>&1 &&
    "$venv/bin/pip" -q install 'cyclonedx-python-lib[json-validation]==11.12.0' >/dev/null 2>&1; then
    check 'the schema of CycloneDX 1.5' schema
    sed 's/"type": "library"/"type": "books"/' "$bom" >"$tmp/bad.json"
    bom=$tmp/bad.json
    check 'the schema is really looked at' fails schema
else
    line 'skip sbom: the schema of CycloneDX 1.5: needs python3-venv and PyPI'
fi
