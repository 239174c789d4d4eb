"""Takes what fuzzing has found among the committed seeds: test/fuzz/NAME.seeds, less what adds no coverage.

    seeds.py NAME...        fuzzers built by make fuzz: build/fuzz/NAME

A seed is a line, the shortest first. What is not printable ASCII in it, and each \\ and %, is three octal digits behind
a \\, so that printf(1) makes the seed of it. The first seeds were what grpcio, curl, h2load and probe said to a plugin
with the fuzzers' KEKs.
"""
import os
import re
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
BUILD = os.path.join(HERE, '../../build/fuzz')
INPUT_MAX = 700         # bytes of a seed


def line_of(seed):
    line = ''.join(chr(b) if 32 <= b < 127 and b not in b'\\%' else f'\\{b:03o}' for b in seed)
    return re.sub(' $', r'\\040', line)


def seed_of(line):
    return re.sub(rb'\\([0-7]{3})', lambda octal: bytes([int(octal[1], 8)]), line.encode())


def renew(fuzzer):
    file = os.path.join(HERE, fuzzer + '.seeds')
    with open(file, encoding='ascii') as old:
        lines = old.read().splitlines()
    found = os.path.join(BUILD, 'corpus', fuzzer)
    os.makedirs(found, exist_ok=True)
    with tempfile.TemporaryDirectory() as given, tempfile.TemporaryDirectory() as merged:
        for number, line in enumerate(lines):
            with open(os.path.join(given, str(number)), 'wb') as one:
                one.write(seed_of(line))
        subprocess.run([os.path.join(BUILD, fuzzer), '-set_cover_merge=1', f'-max_len={INPUT_MAX}', merged, given, found],
                       stderr=subprocess.DEVNULL, check=True)
        seeds = []
        for name in os.listdir(merged):
            with open(os.path.join(merged, name), 'rb') as one:
                seeds.append(one.read())
    with open(file, 'w', encoding='ascii') as out:
        out.writelines(line_of(seed) + '\n' for seed in sorted(seeds, key=lambda seed: (len(seed), seed)))
    print(f'{fuzzer}: {len(lines)} seeds before, {len(seeds)} now')


for name in sys.argv[1:]:
    renew(name)
