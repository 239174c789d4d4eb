#!/usr/bin/env python3
"""What makes up a release build, from its link map: bytes by library, and the largest parts of each.

    size.py PROGRAM [SOURCES]    PROGRAM.map beside it; SOURCES is build/static/ARCH/src

An object of an archive names its library. What link-time optimisation has put into one object is told apart by the name
of its section, which is that of a function or table: it belongs to the first of the sources that defines such a name.
"""
import collections
import glob
import os
import platform
import re
import sys

LARGEST = 8             # parts listed of each library
NO_BYTES = ('.bss', '.tbss', '.comment', '.note', '.debug', '.gnu.lto', '.symtab', '.strtab', '.shstrtab')
PREFIX = re.compile(r'^\.(?:rela?\.)?(?:text|rodata|data\.rel\.ro|data\.rel|data)'
                    r'(?:\.(?:local|unlikely|hot|startup|exit))*\.?')


def definitions(files):
    """The names that begin a line's declarator: functions and tables at file level."""
    found = set()
    for path in files:
        with open(path, encoding='utf-8', errors='replace') as file:
            for line in file:
                if re.match(r'[A-Za-z_}]', line):
                    found.update(re.findall(r'\b([A-Za-z_]\w*)(?:\[[^]]*\])*\s*(?:\(|=|;|$)', line))
                elif found_here := re.match(r'\s+static const [^=(]*?\b(\w+)\[?[^=(]*=', line):
                    found.add(found_here[1])    # tables within functions
    return found


def parts(path):
    """(output section, input section, bytes, object) of all that the link has kept."""
    with open(path, encoding='utf-8') as file:
        text = file.read().split('Linker script and memory map')[1]
    text = re.sub(r'^( ?\.\S+)\n +(?=0x)', r'\1 ', text, flags=re.M)
    out = ''
    for line in text.splitlines():
        if match := re.match(r'(\.\S+)\s+0x', line):
            out = match[1]
        elif match := re.match(r' (\.\S+|COMMON)\s+0x[0-9a-f]+\s+0x([0-9a-f]+) (\S+)$', line):
            size = int(match[2], 16)
            if size and out and not out.startswith(NO_BYTES):
                yield out, match[1], size, match[3]


def main(program, sources=f'build/static/{platform.machine()}/src'):
    places = [('kmsplugin.c', definitions(['kmsplugin.c'])), ('kms.pb-c.c', definitions(['kms.pb-c.c'])),
              *((name, definitions(glob.glob(f'{sources}/{name}/{where}')))
                for name, where in (('nghttp2', 'lib/*.c'), ('protobuf-c', 'protobuf-c/*.c')))]
    total, largest = collections.Counter(), collections.defaultdict(collections.Counter)
    for out, section, size, path in parts(program + '.map'):
        name = PREFIX.sub('', section).split('.')[0]
        if out.startswith('.rel'):
            place, part = 'relocations', 'of ' + (name or section)
        elif archive := re.search(r'/lib(\w+)\.a\((.*)\)', path):
            place, part = {'c': 'musl', 'gcc': 'libgcc'}.get(archive[1], archive[1]), archive[2]
        elif 'ltrans' in path:
            place = next((p for p, names in places if name in names), 'link-time optimised, unnamed')
            part = name or section
        else:
            place, part = 'start, and what the linker makes', os.path.basename(path) + ' ' + section
        total[place] += size
        largest[place][part] += size
    for place, size in total.most_common():
        print(f'{size:8} {place}')
        for part, bytes_ in largest[place].most_common(LARGEST):
            print(f'{bytes_:17}  {part}')
    size = os.path.getsize(program)
    print(f'{size - sum(total.values()):8} headers, and padding between pages\n{size:8} in all')


if __name__ == '__main__':
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(*sys.argv[1:])
