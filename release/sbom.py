#!/usr/bin/env python3
"""Prints the bill of materials of a release build, as CycloneDX 1.5 (JSON).

    sbom.py VERSION ARCH PROGRAM    SOURCE_DATE_EPOCH in the environment

What went into it is read from build/static/ARCH/SHA256SUMS, which release/static-libs.sh leaves: a component for each
library, with the exact version of its source and the SHA-256 of every archive of it; nothing in those is changed. On
x86_64 release/string.c is one more. The same build gives the same document. (libgcc, of which some architectures take a few routines, goes by the compiler's version.)
"""
import datetime
import hashlib
import json
import os
import re
import subprocess
import sys
import uuid

LICENSES = {'musl': 'MIT', 'nghttp2': 'MIT', 'protobuf-c': 'BSD-2-Clause', 'bearssl': 'MIT'}


def sha256(path):
    with open(path, 'rb') as file:
        return hashlib.sha256(file.read()).hexdigest()


def first_line(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]


def sources(sums):
    """By library: its version, its package URL, and (archive, SHA-256) of all that it was built from."""
    found = {}
    with open(sums, encoding='utf-8') as lines:
        for line in lines:
            digest, path = line.split()
            file = os.path.basename(path)
            name = re.match('(' + '|'.join(LICENSES) + ')[_-]', file)[1]
            library = found.setdefault(name, {'archives': []})
            library['archives'].append((file, digest))
            if debian := re.fullmatch(r'[^_]+_(.+)\.dsc', file):
                library['version'] = debian[1]
                library['purl'] = f'pkg:deb/debian/{name}@{debian[1].replace("+", "%2B")}?arch=source'
    if sorted(found) != sorted(LICENSES):
        sys.exit(f'sbom.py: {sums} has {sorted(found)}, not {sorted(LICENSES)}')
    return found


def component(name, library):
    return {
        'type': 'library', 'bom-ref': library['purl'], 'name': name, 'version': library['version'],
        'licenses': [{'license': {'id': LICENSES[name]}}], 'purl': library['purl'],
        'externalReferences': [
            {'type': 'distribution', 'url': file, 'hashes': [{'alg': 'SHA-256', 'content': digest}]}
            for file, digest in sorted(library['archives'])],
    }


def main(version, arch, program):
    libraries = sources(f'build/static/{arch}/SHA256SUMS')
    with open(f'build/static/{arch}/bin/cc', encoding='utf-8') as file:
        compiler = re.search(r'^exec (\S+)', file.read(), re.M)[1]
    files = [{'type': 'file', 'bom-ref': name, 'name': name, 'hashes': [{'alg': 'SHA-256', 'content': sha256(name)}]}
             for name in ['release/string.c'] if arch == 'x86_64']
    digest = sha256(program)
    top = f'pkg:generic/kmsplugin@{version}?arch={arch}'
    time = datetime.datetime.fromtimestamp(int(os.environ['SOURCE_DATE_EPOCH']), datetime.timezone.utc)
    json.dump({
        'bomFormat': 'CycloneDX', 'specVersion': '1.5', 'version': 1,
        'serialNumber': f'urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, "sha256:" + digest)}',
        'metadata': {
            'timestamp': time.strftime('%Y-%m-%dT%H:%M:%SZ'),
            'component': {
                'type': 'application', 'bom-ref': top, 'name': 'kmsplugin', 'version': version, 'purl': top,
                'licenses': [{'license': {'id': 'MIT'}}], 'hashes': [{'alg': 'SHA-256', 'content': digest}],
                'properties': [{'name': f'kmsplugin:{name}', 'value': first_line(compiler, option)}
                               for name, option in (('compiler', '--version'), ('linker', '-Wl,--version'))],
            },
        },
        'components': [component(name, libraries[name]) for name in sorted(libraries)] + files,
        'dependencies': [{'ref': top, 'dependsOn': sorted(x['purl'] for x in libraries.values()) + [x['bom-ref'] for x in files]}],
    }, sys.stdout, indent=2)
    print()


if __name__ == '__main__':
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
