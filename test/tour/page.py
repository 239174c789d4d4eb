"""doc/tour.html: a real conversation, each octet of which opens where it lies.

    page.py write       captures the conversation, and writes the page
    page.py check       fails when page and program disagree, or a browser has a fault to find: a line for each test

In doc/tour/ are the prose with its pictures and commands, page.in.html, and the words about octets, texts.ini. Elements that HTML does not have
are filled in: <part>, <rec> (a piece of the conversation), <draw> (a picture), <run> (a command, which is run now).
"""
import difflib
import itertools
import os
import re
import string
import subprocess
import sys
from html import escape, unescape
from unittest import mock

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
import browser
import octets
import sealed
import talk
from hpack.huffman_constants import REQUEST_CODES, REQUEST_CODES_LENGTH
from hpack.table import HeaderTable
from octets import FUNCTIONS, TEXTS, Reader, boxes, expand, function, read
from plugin import BINARY, ROOT, WAIT, Server, fresh_dir, kms
from plugin import text as encoded
from raw import field
from talk import KEK, PROGRAM

TEMPLATE = os.path.join(ROOT, 'doc/tour/page.in.html')
PAGE = os.path.join(ROOT, 'doc/tour.html')

# The octets of the example tell where they come from: all of them count up.
NONCE = bytes(range(0xa0, 0xb8))        # as fixed.c gives it out
SEED, SEED2 = bytes(range(0xc0, 0xe0)), bytes(range(0xe0, 0x100))       # as client.go sends them
INFO, GCM_NONCE = bytes(range(0x60, 0x80)), bytes(range(0x80, 0x8c))
ETCD_KEY = '/registry/secrets/default/db'
# `kubectl create secret generic db --from-literal=password=hunter2`, without what the API server adds
SECRET = field(1, field(1, b'db') + field(3, b'default')) + \
    field(2, field(1, b'password') + field(2, b'hunter2')) + field(3, b'Opaque')
OBJECT = b'k8s\0' + field(1, field(1, b'v1') + field(2, b'Secret')) + field(2, SECRET) + field(3, b'') + field(4, b'')


# ----------------------------------------------------------------- elements

def tree(calls):
    """Calls as (name, calls below) of the sections that are shown. Equal neighbours become one, with a count."""
    found, at = [], 0
    while at < len(calls):
        end = at + 1
        while end < len(calls) and calls[end][0] > calls[at][0]:
            end += 1
        name, below = calls[at][1], tree(calls[at + 1:end])
        if name in TEXTS['calls']['hidden'].split() or FUNCTIONS.get(name, ('',))[0] not in TEXTS['calls']['sections'].split(', '):
            found += below
        elif found and found[-1][:2] == (name, below):
            found[-1] = name, below, found[-1][2] + 1
        else:
            found.append((name, below, 1))
        at = end
    return found


def tree_html(nodes):
    return '<ul>' + ''.join(f'<li>{function(name, "tree")}{f" × {count}" * (count > 1)} <span class=at>{FUNCTIONS[name][0]}</span>' +
                            (tree_html(below) if below else '') for name, below, count in nodes) + '</ul>'


def draw(match):
    """A picture. An item is `KIND X Y ...`: zone, foot, box, step and key are W H WORDS, line is further points, at is a number, note is words."""
    width, height, title, text = match.groups()
    parts = []
    for item in re.split(r' ; |\n', text.strip()):
        kind, rest = item.split(' ', 1)
        if kind == 'line':
            points = [tuple(int(n) for n in pair.split(',')) for pair in rest.split()]
            (x0, y0), (x1, y1) = points[-2:]
            dx, dy = (x1 > x0) - (x1 < x0), (y1 > y0) - (y1 < y0)
            tip = [(x1, y1), *((x1 - 8 * dx + 4 * s * dy, y1 - 8 * dy + 4 * s * dx) for s in (1, -1))]
            parts.append('<path d="M' + ' L'.join(f'{x} {y}' for x, y in [*points[:-1], (x1 - 7 * dx, y1 - 7 * dy)]) +
                         '"/><polygon points="' + ' '.join(f'{x},{y}' for x, y in tip) + '"/>')
        elif kind == 'at':
            x, y, shown = rest.split(' ')
            parts.append(f'<circle cx="{x}" cy="{y}" r="9"/><text class="n" x="{x}" y="{int(y) + 4}">{shown}</text>')
        elif kind == 'note':
            x, y, shown = rest.split(' ', 2)
            parts.append(f'<text class="small start" x="{x}" y="{y}">{escape(shown)}</text>')
        else:
            x, y, w, h = (int(n) for n in rest.split(' ')[:4])
            first, *more = rest.split(' ', 4)[4].split('|')
            rect = f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="{8 if kind == "step" else 3}"/>'
            if kind.startswith(('zone', 'foot')):           # a place, with its name at the top or at the bottom
                parts.append(f'<g class="{kind}">{rect}<text x="{x + 12}" y="{y + (20 if kind.startswith("zone") else h - 11)}">{escape(first)}</text></g>')
                continue
            top = y + h / 2 + 4 - 7 * len(more)
            small = ''.join(f'<text class="small" x="{x + w // 2}" y="{top + 15 * n:g}">{escape(part)}</text>' for n, part in enumerate(more, 1))
            parts.append(f'<g class="{kind}">{rect}<text x="{x + w // 2}" y="{top:g}">{escape(first)}</text>{small}</g>')
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">' + ''.join(parts) + '</svg>'


def run(match, values):
    """A command, with what it prints now; that must have all words of `expects` in it."""
    expects, command = (string.Template(part or '').safe_substitute(values).strip() for part in match.groups())
    done = subprocess.run(['bash', '-c', unescape(command).replace('./kmsplugin', BINARY)], cwd=ROOT, timeout=WAIT, check=False, text=True,
                          env={'PATH': '/usr/bin:/bin', 'KMS_KEK': encoded(KEK)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    printed = done.stdout.rstrip('\n')
    bare = re.sub(r'[\s:]', '', printed).lower()
    assert expects and all(part in bare for part in expects.split()), f'{command}\nprints:\n{printed}\nand not:\n{expects}'
    return f'<div class=run><pre class=cmd tabindex=0>{escape(unescape(command), False)}</pre><pre class=out>{escape(printed)}</pre></div>'


def tables():
    """What is the same in each conversation: HPACK's static table, Huffman's codes for ASCII, the glossary."""
    static = ''.join(f'<tr><td>{n}<td>{name.decode()}<td>{value.decode()}' for n, (name, value) in enumerate(HeaderTable.STATIC_TABLE, 1))
    codes = ''.join(f'<li><b>{escape(shown) if shown != " " else "space"}</b> <code>{octets.binary(code, size)}</code>' for size, code, shown in
                    sorted((REQUEST_CODES_LENGTH[n], REQUEST_CODES[n], chr(n)) for n in range(32, 127)))
    return {'static': f'<table class=cut><tr><th>entry<th>name<th>value{static}</table>', 'codes': f'<ul class=codes>{codes}</ul>',
            'words': '<dl>' + ''.join(f'<dt id={octets.word_id(name)}>{name}<dd>{text}' for name, text in TEXTS['words'].items()) + '</dl>'}


def clients_html(flights, probe):
    """The headers of a first request, as two clients send them."""
    heads = [next(frame[9:] for frame in talk.frames(data) if frame[3] == octets.HEADERS) for data in (flights[2][1], probe[0][1])]
    blocks = [Reader('client', '').block(head)[1] for head in heads]
    def cell(found):
        return f'{escape(found[0])}<br><code>{found[1].hex(" ")}</code>' if found else 'not sent'
    rows = ''.join(f'<tr><td>{name}<td>{cell(blocks[0].get(name))}<td>{cell(blocks[1].get(name))}' for name in {**blocks[0], **blocks[1]})
    return f'<table class="cut fit"><tr><th>header<th>grpc-go {blocks[0]["user-agent"][0].split("/")[1]}<th>kmsplugin probe{rows}</table>'


def index_html():
    """The functions that the page names, by section."""
    rows, mentioned = {}, set().union(*octets.named.values())
    for name, (section, _) in FUNCTIONS.items():
        if name in mentioned:
            rows.setdefault(section, []).append(function(name, 'index'))
    return '<table class=cut>' + ''.join(f'<tr><td>{section}<td>{", ".join(names)}' for section, names in rows.items()) + '</table>'


# --------------------------------------------------------------------- page

def exercise():
    """The header blocks that a reader is to decode, as frames."""
    for n, line in enumerate(re.search(r'<exercise>\n(.*?)</exercise>', read(TEMPLATE), re.S)[1].split('\n\n')):
        block = bytes.fromhex(line)
        yield len(block).to_bytes(3, 'big') + bytes([octets.HEADERS, octets.END_HEADERS | octets.END_STREAM, 0, 0, 0, 2 * n + 1]) + block


def etcd_values(forms):
    """What kube-apiserver stores, as KMS v2 and as KMS v1, and the functions that `unseal` calls for both."""
    with mock.patch('os.urandom', side_effect=[SEED, GCM_NONCE, INFO, NONCE]):
        v2 = sealed.etcd_v2(KEK, ETCD_KEY.encode(), OBJECT)
    with mock.patch('os.urandom', side_effect=[SEED, GCM_NONCE, NONCE]):
        v1 = sealed.etcd_v1(KEK, ETCD_KEY.encode(), OBJECT)
    ran = set()
    for name, value, form in (('v2', v2, forms[0]), ('v1', v1, forms[2])):
        assert form in value, 'the program and test/sealed.py seal differently'
        with open(os.path.join(ROOT, 'build/tour', name), 'wb') as file:
            file.write(value)
        calls = os.path.join(fresh_dir(), 'calls')
        done = subprocess.run([PROGRAM, 'unseal', ETCD_KEY], input=value, stdout=subprocess.PIPE, timeout=WAIT, check=True,
                              env={'KMS_KEK': encoded(KEK), 'TOUR_CALLS': calls})
        assert done.stdout == OBJECT, 'unseal gives another object'
        ran |= {name for _, name in talk.call_lines(calls)}
    return v2, v1, ran


def numbers(forms):
    """What the commands of the page need, and what they must print: by name, in hexadecimal digits."""
    form, again, old = forms
    l = sealed.aes(KEK, bytes(16))
    doubled = int.from_bytes(l, 'big') << 1
    found = {'kek': KEK, 'key_id': bytes.fromhex(sealed.key_id(KEK)), 'l': l, 'k1': (doubled ^ (doubled >> 128) * (1 << 128 | 0x87)).to_bytes(16, 'big'),
             'key': sealed.derive(KEK, NONCE), 'nonce1': NONCE[:12], 'nonce2': NONCE[12:], 'seed': SEED, 'seed2': SEED2, 'form': form,
             'head': form[:17], 'ciphertext': form[41:-16], 'tag': form[-16:], 'ciphertext2': again[41:-16],
             'tag2': again[-16:], 'tagv1': old[-16:], 'info': INFO, 'gcm_nonce': GCM_NONCE,
             'data_key': sealed.hmac.digest(SEED, INFO + b'\x01', 'sha256')}
    found['stored'] = sealed.AESGCM(found['data_key']).encrypt(GCM_NONCE, OBJECT, ETCD_KEY.encode())
    digits = {name: value.hex() for name, value in found.items()}
    return {**digits, 'form_lines': "'\n    '".join(digits['form'][at:at + 72] for at in range(0, 178, 72)),
            'stored_lines': "'\n    '".join(digits['stored'][at:at + 72] for at in range(0, len(digits['stored']), 72))}


def conversation(document, flights, segments):
    """The document with its records, and the ladder that leads to them; by record, the calls that it describes; what Encrypt gave."""
    readers = {'client': Reader('client', 'c'), 'server': Reader('server', 's')}
    ladder, calls, pieces = [], {}, re.split(r'^<rec (\S+) (.*)>\n', document, flags=re.M)
    assert len(pieces) == 3 * len(flights) + 1, f'{len(flights)} pieces are said, and {len(pieces) // 3} have a text: {[(s, len(d)) for s, d in flights]}'
    shown, piece = pieces[0], 0
    for n, (side, data) in enumerate(flights):
        anchor, title, text = pieces[3 * n + 1:3 * n + 4]
        text, rest = text.split('</recs>\n') if '</recs>\n' in text else (text, '')
        piece += side == 'client'
        calls[anchor] = segments[piece]
        readers['server'].kind = readers['client'].kind
        begin = readers[side].at
        body, names = readers[side].html(data, anchor)
        way = ' → '.join(('client', 'server') if side == 'client' else ('server', 'client'))
        shown += (f'<section class="rec {side}" id={anchor}><h3>{n + 1} {title}</h3><p class=span><b>{way}</b> octets {begin} to '
                  f'{begin + len(data) - 1} of the {side}</p>\n{expand(text, anchor)}{body}</section>\n{rest}')
        ladder.append(f'<li class={side}><a href="#{anchor}"><b>{n + 1}</b> {title}</a> <span>{", ".join(names)}: {len(data):,} octets</span>')
    return shown.replace('<part ladder>', '<ol class=ladder>' + '\n'.join(ladder) + '</ol>'), calls, \
        [kms.EncryptResponse.FromString(message).ciphertext for kind, message in readers['server'].messages if kind.endswith('Encrypt')]


def page():
    octets.named.clear()
    flights, segments = talk.capture()
    probe = talk.relayed(lambda path: [PROGRAM, 'probe', 'unix://' + path])
    document, calls, forms = conversation(read(TEMPLATE), flights, segments)
    v2, v1, opened = etcd_values(forms)
    ran = {where: {name for _, name in part} for where, part in {'start': segments[0], **calls}.items()}
    anything = set().union(*ran.values())
    first = next(at for at, (_, name) in enumerate(calls['encrypt']) if name == 'conn_ready')
    below = itertools.takewhile(lambda call: call[0] > calls['encrypt'][first][0], calls['encrypt'][first + 1:])
    values = numbers(forms)
    parts = {'tree': tree_html(tree([calls['encrypt'][first], *below])), **tables(), 'clients': clients_html(flights, probe),
             'probe': Reader('client', 'p').html(probe[0][1], 'probe')[0], 'answer': Reader('client', 'x', True).html(b''.join(exercise()), 'exercise')[0],
             'sealed': boxes(octets.sealed_parts(forms[0], 'written', 'encrypted'), 'f'),
             'etcd': boxes(octets.etcd_parts(v2, 2), 'e'), 'etcd v1': boxes(octets.etcd_parts(v1, 1), 'o'), 'object': boxes(octets.object_parts(OBJECT), 'k')}
    ran |= {'etcd': opened, 'back': opened, 'encrypted': ran['encrypted'], 'tree': anything, 'sealed': anything, 'way': anything}
    document = document.replace('#c-long', '#' + re.search(r'>7f 00</code>.*?id=(c-\d+)', document)[1])   # a number of HPACK in two octets
    document = re.sub(r'<exercise>\n(.*?)</exercise>', r'<pre class=cmd tabindex=0>\1</pre>', document, flags=re.S)
    document = re.sub(r'<draw (\d+) (\d+) (.*?)>\n(.*?)</draw>', draw, document, flags=re.S)
    document = re.sub(r'<run(?: expects="(.*?)")?>\n(.*?)</run>', lambda match: run(match, values), document, flags=re.S)
    document = re.sub(r'<part ([a-z0-9 ]+)>', lambda match: parts[match[1]] if match[1] != 'index' else match[0], document)
    chapters = re.split(r'(?=<h2 id=)', document)
    document = ''.join(expand(chapter, (re.match('<h2 id=([a-z]+)', chapter) or [0, 'head'])[1]) for chapter in chapters).replace('<part index>', index_html())
    check_page(document, ran)
    return document


def check_page(document, ran):
    ids = re.findall(r'\bid="?([^"> ]+)', document)
    assert len(ids) == len(set(ids)), f'an id comes twice: {sorted(name for name in ids if ids.count(name) > 1)[:5]}'
    broken = set(re.findall(r'href="#([^"]+)"', document)) - set(ids)
    assert not broken, f'links that lead nowhere: {sorted(broken)}'
    missing = set().union(*octets.named.values()) - set(FUNCTIONS)
    assert not missing, f'not functions of kmsplugin.c: {sorted(missing)}'
    for where, names in ran.items():
        assert octets.named[where] <= names, f'{where} names functions that are not called there: {sorted(octets.named[where] - names)}'
    for path in re.findall(r'href="\.\./([^"#]+)', document) + re.findall(r'<code>((?:test|doc|deploy)/[\w/.]+)</code>', document):
        assert os.path.exists(os.path.join(ROOT, path)), f'{path}: no such file'
    source = set(re.findall(r'\w+', re.sub(r'/\*.*?\*/', '', read(octets.SOURCE) + read(os.path.join(ROOT, 'kms.proto')), flags=re.S)))
    names = re.findall(r'<code>([A-Z]+_[A-Z_]+)</code>', document) + re.findall(r'\b[a-z]+_\w+', ' '.join(re.findall('<text[^>]*>(.*?)</text>', document)))
    assert set(names) <= source, f'kmsplugin.c has no {sorted(set(names) - source)}'
    for script, name in re.findall(r'test/(run|hostile)\.py (\w[\w.]*)', document):
        module, *names = name.split('.') if script == 'run' else ('hostile', name)
        body = read(os.path.join(ROOT, 'test', module + '.py'))
        assert all(re.search(rf'\b{part}\b', body) for part in names), f'{script}.py has no {name}'


# -------------------------------------------------------------------- checks

def check_octets():
    fresh = page()
    diff = list(difflib.unified_diff(read(PAGE).splitlines(), fresh.splitlines(), 'doc/tour.html', 'the program', lineterm='', n=0))
    short = [re.sub(r'<[^>]*>', ' ', line)[:400] for line in diff[:20]]
    assert not diff, '\n'.join(['make tour writes it anew', *short])


def check_exercise():
    """The program answers what the exercise asks a reader to decode."""
    server = talk.serve()
    with talk.connect(server.path) as connected:
        said = talk.Talk(connected)
        for request in (octets.PREFACE + bytes([0, 0, 0, octets.SETTINGS]) + bytes(5), *exercise()):
            said.exchange(request)
        assert [data[9] for _, data in said.flights[3::2]] == [0x88, 0x88], 'not :status 200, twice'
    server.stop()


def check_watch():
    """The view of a running plugin with keys and nonces of its own."""
    server = Server()
    shown = subprocess.run([sys.executable, os.path.join(HERE, 'talk.py'), 'watch', 'unix://' + server.path], check=True,
                           timeout=WAIT, capture_output=True, text=True).stdout
    server.stop()
    assert shown.count('client says') == shown.count('server says') + 1 and 'GOAWAY' not in shown and 'sealed form' in shown, shown


def check():
    failed = 0
    for test in (check_octets, check_exercise, check_watch):
        name = test.__name__.removeprefix('check_')
        try:
            test()
            print(f'ok tour {name}', flush=True)
        except Exception as error:      # whatever the program says
            failed += 1
            print('\n'.join('    ' + line for line in f'{type(error).__name__}: {error}'.splitlines()) + f'\nnot ok tour {name}')
    return 1 if failed + browser.check()[1] else 0


def write():
    fresh = page()      # ahead of the file, which stays as it is when this fails
    with open(PAGE, 'w', encoding='utf-8') as file:
        file.write(fresh)


if __name__ == '__main__':
    if sys.argv[1:] not in (['write'], ['check']):
        sys.exit(__doc__)
    sys.exit({'write': write, 'check': check}[sys.argv[1]]())
