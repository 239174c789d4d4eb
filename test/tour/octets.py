"""Octets taken apart into ranges, each with a text: HTTP/2, HPACK, gRPC, protobuf, the sealed form, values in etcd.

The words are in doc/tour/texts.ini. What the octets say is found here, by a parser of its own.
"""
import collections
import configparser
import os
import re
import string
from html import escape, unescape
from urllib.parse import quote

from hpack.hpack import decode_integer
from hpack.huffman_constants import REQUEST_CODES, REQUEST_CODES_LENGTH
from hpack.huffman_table import decode_huffman
from hpack.table import HeaderTable

from plugin import ROOT, kms

SOURCE = os.path.join(ROOT, 'kmsplugin.c')
PREFACE = b'PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n'
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, ACK, END_HEADERS = 1, 1, 4
FLAGS = {DATA: {3: 'PADDED', 0: 'END_STREAM'}, HEADERS: {5: 'PRIORITY', 3: 'PADDED', 2: 'END_HEADERS', 0: 'END_STREAM'},
         SETTINGS: {0: 'ACK'}, PING: {0: 'ACK'}}
STATIC_ENTRIES = 61
SHOWN_MAX = 128         # octets of a range that are shown; the middle of a longer one is left out


def read(path):
    with open(path, encoding='utf-8') as file:
        return file.read()


TEXTS = configparser.RawConfigParser(delimiters='=')
TEXTS.optionxform = str
TEXTS.read_string(read(os.path.join(ROOT, 'doc/tour/texts.ini')))

named = collections.defaultdict(set)    # where on the page: the functions that are named there


def number(octets):
    return int.from_bytes(octets, 'big')


def functions():
    """Each function of kmsplugin.c: its section, and the words that begin its definition."""
    found, section = {}, ''
    for line in read(SOURCE).splitlines():
        if heading := re.match(r'/\* -{5,} (.*?)(?: \*/)?$', line):
            section = heading[1]
        elif (begin := re.match(r'(\w[\w *]*?\b(\w+))\(', line)) and not line.endswith(';'):
            found[begin[2]] = section, begin[1]
    return found


FUNCTIONS = functions()


# ------------------------------------------------------------------- markup

def function(name, where):
    """A link to a function: to the words of its definition, not to a line, whose number each edit above it would change."""
    named[where].add(name)
    return f'<a href="../kmsplugin.c#:~:text={quote(FUNCTIONS.get(name, ("", name))[1])}"><code>{name}</code></a>'


def word_id(name):
    return 'w-' + re.sub('[^a-z]+', '-', name.lower()).strip('-')


def word(name, shown=None):
    assert name in TEXTS['words'], f'{name} is not among the words'
    return f'<a class=w href="#{word_id(name)}">{shown or name}</a>'


def expand(text, where, /, **values):
    """A text with its marks: $value, {f:function}, {w:word} or {w:word|as shown}."""
    text = string.Template(text).safe_substitute({name: str(value) for name, value in values.items()})
    text = re.sub(r'(?<![\d,.])1 (octet|character)s\b', r'1 \1', text)
    text = re.sub(r'\{f:(\w+)\}', lambda mark: function(mark[1], where), text)
    return re.sub(r'\{w:([^}|]+)(?:\|([^}]*))?\}', lambda mark: word(mark[1], mark[2]), text)


def words(section, name, where='', /, **values):
    return expand(TEXTS[section][name], where, **values)


def p(section, name, where='', /, **values):
    return f'<p>{words(section, name, where, **values)}</p>'


def cite(source):
    """`RFC 9113 6.5`, or a name in [sources], as a link."""
    if match := re.fullmatch(r'RFC (\d+)(?: ([\dA-C.]+))?', source):
        part = match[2] and ('appendix' if match[2][0] in 'ABC' else 'section', match[2])
        where = f'#{part[0]}-{part[1]}' if part else ''
        return f'<a href="https://www.rfc-editor.org/rfc/rfc{match[1]}{where}">RFC {match[1]}' + (f', {part[0]} {part[1]}' if part else '') + '</a>'
    return f'<a href="{TEXTS["sources"][source]}">{source}</a>' if source in TEXTS['sources'] else escape(source)


def by(mode, who, where):
    """Who reads the octets, or who has written them: `READER ; WRITER`, each `function`, `function via library` or a library."""
    if who == 'nobody':
        return words('who', 'nobody')
    name, start, library = re.fullmatch(r'([\w-]+?)(@start)?(?: via ([\w-]+))?', who.split(' ; ')[0 if mode == 'read' else -1]).groups()
    if name in ('nghttp2', 'protobuf-c'):
        return words('who', f'{mode} alone', library=name)
    kind = 'made' if name == 'on_send' else f'{mode} via' if library else mode
    return words('who', kind, library=library or 'nghttp2', function=function(name, 'start' if start else where))


def binary(octet, width=8):
    return f'{octet:0{width}b}'


def bits(data, *groups):
    """Octets, and the same as groups of bits side by side, each with words under it: (bits, words, class)."""
    cells = ''.join(f'<span class={kind}><b>{digits}</b><i>{escape(under)}</i></span>' for digits, under, kind in groups)
    return f'<div class=bits><code{" class=long" * (len(data) > 4)}>{data.hex(" ")} =</code>{cells}</div>'


def sevens(octets):
    """Octets of which each has a top bit that says whether one more follows: their groups of bits, and their sum in words."""
    return ([group for octet in octets for group in ((binary(octet)[0], 'more?', 'm'), (binary(octet)[1:], '7 bits', 'v'))],
            ' + '.join(f'{octet & 127} × 2<sup>{7 * n}</sup>' for n, octet in enumerate(octets)))


def integer(octets, prefix, pattern, meaning):
    """HPACK's integer behind a pattern of bits: drawn, its value and its length."""
    value, used = decode_integer(octets, prefix)
    groups, total = sevens(octets[1:used])
    first = binary(octets[0])
    return (bits(octets[:used], (first[:8 - prefix], pattern, 'm'), (first[8 - prefix:], f'{prefix} bits', 'v'), *groups) +
            p('draw', 'integer long' if used > 1 else 'integer', prefix=prefix, value=value, meaning=meaning,
              low=(1 << prefix) - 1, sum=total), value, used)


def varint(octets):
    """A varint of protobuf: drawn, its value and its length."""
    used = next(at for at, octet in enumerate(octets) if octet < 128) + 1
    value = sum((octet & 127) << 7 * at for at, octet in enumerate(octets[:used]))
    groups, total = sevens(octets[:used])
    return bits(octets[:used], *groups) + (p('draw', 'varint long', sum=total, value=value) if used > 1 else ''), value, used


def huffman(content):
    """Each character with its code."""
    cells, used, stream = [], 0, ''.join(binary(octet) for octet in content)
    for character in (text := decode_huffman(content).decode()):
        size = REQUEST_CODES_LENGTH[ord(character)]
        assert stream[used:used + size] == binary(REQUEST_CODES[ord(character)], size)
        cells.append((stream[used:used + size], character if character != ' ' else '␣', 'v'))
        used += size
    return bits(content, *cells, *([(stream[used:], 'fill', 'm')] if used < len(stream) else [])) + \
        p('draw', 'huffman', characters=len(text), octets=len(content))


class Part:
    """A range of octets: what it is in few words, and all about it."""

    def __init__(self, data, mode, where, name, drawn='', /, css='', secret=False, **values):
        """`name` is an entry of [part], `what | body | source | who`."""
        what, body, self.source, who = TEXTS['part'][name].split(' | ')
        who = TEXTS[where].get(name, who) if where in TEXTS else who
        self.data = bytes(data)
        self.what = expand(what, where, **values)
        self.body = (f'<p>{expand(body, where, **values)}</p>' if body else '') + drawn
        self.source = string.Template(self.source).safe_substitute(values)
        self.who = by(mode, string.Template(who).safe_substitute(values), where)
        self.css = css + ' secret' * secret

    def hexes(self):
        size, width = len(self.data), 9 if len(self.data) == 9 else 8
        lines = [self.data[at:at + width].hex(' ') for at in range(0, size, width)]
        return '\n'.join(lines if size <= SHOWN_MAX else [*lines[:2], f'… {size - 25 - (size - 1) % 8:,} more …', *lines[-2:]])

    def html(self, at, anchor):
        end = at + len(self.data) - 1
        place = f'Octet {at}' if end == at else f'Octets {at} to {end}'
        return (f'<details class="part{self.css}"><summary><span class=at>{at}</span><code class=hex>{self.hexes()}</code>'
                f'<span class=what>{self.what}</span></summary><div class=in id={anchor}>{self.body}'
                f'<p class=src><a href="#{anchor}">{place}.</a> {words("who", "defined", source=cite(self.source))} {self.who}</p></div></details>\n')


def boxes(parts, anchor, at=0, note=''):
    """Ranges that lie behind each other, in a box."""
    shown = ''
    for part in parts:
        shown += part.html(at, f'{anchor}-{at}')
        at += len(part.data)
    return f'<div class=frame>{shown}{note}</div>'


# ------------------------------------------------------------------ protobuf

def schema(descriptor):
    """A message: by number of field, its name and its kind."""
    kinds = {9: 'string', 12: 'bytes'}
    return {field.number: (field.name, field.enum_type or kinds.get(field.type)) for field in descriptor.fields}


def message_parts(data, fields, kind, mode, where, opened=None, who=None):
    """A protobuf message, field by field. `opened` has a function for fields that have parts of their own."""
    parts, at = [], 0
    who = {'who': who or ('kms_call via protobuf-c' if mode == 'read' else 'answer_message via protobuf-c')}
    while at < len(data):
        tag, begin = data[at], at
        assert tag < 128
        name, type_ = fields[tag >> 3]
        about = {'number': tag >> 3, 'field': name, 'kind': kind, 'is': TEXTS['message'][name], **who}
        drawn = bits(data[at:at + 1], (binary(tag)[0], 'more?', 'm'), (binary(tag)[1:5], f'field {tag >> 3}', 'v'),
                     (binary(tag)[5:], {0: 'type 0: a varint', 2: 'type 2: length, octets'}[tag & 7], 'm'))
        if tag & 7 == 0:
            shown, value, used = varint(data[at + 1:])
            parts += [Part(data[at:at + 1], mode, where, 'enum tag', drawn, **about),
                      Part(data[at + 1:at + 1 + used], mode, where, 'enum', shown, value=value, name=type_.values_by_number[value].name, **who)]
            at += 1 + used
            continue
        shown, length, used = varint(data[at + 1:])
        at += 1 + used
        parts.append(Part(data[begin:at], mode, where, 'field', drawn + p('draw', 'varint', length=length) + shown, length=length, **about))
        content = data[at:at + length]
        at += length
        if isinstance(type_, dict):
            parts += message_parts(content, type_, name, mode, where, opened, who['who'])
        elif opened and name in opened:
            parts += opened[name](content)
        elif content:
            key = {'plaintext': 'seed', 'plain': 'data key'}.get(name)
            entry = 'secret' if key else 'string value' if type_ == 'string' else 'bytes'
            parts.append(Part(content, mode, where, entry, secret=bool(key) or name == 'value', plain=key, meaning=about['is'][0].upper() + about['is'][1:],
                              text='' if key else escape(content.decode()), **who))
    return parts


def sealed_parts(data, mode, where, plain='seed'):
    """The sealed form: section 4 of the contract."""
    assert len(data) > 57
    return [Part(data[begin:end], mode, where, 'sealed ' + name, plain=plain) for name, begin, end in
            (('format', 0, 1), ('fingerprint', 1, 17), ('nonce 1', 17, 29), ('nonce 2', 29, 41), ('ciphertext', 41, -16), ('tag', -16, None))]


def etcd_parts(value, version):
    """What kube-apiserver stores."""
    head = value.index(b'name:') + 5
    def part(data, name, **values):
        return Part(data, 'read', 'etcd', name, v=version, **values)
    def gcm(data):
        return [part(data[:12], 'gcm nonce'), part(data[12:-16], 'gcm ciphertext'), part(data[-16:], 'gcm tag')]
    parts = [part(value[:head], 'etcd prefix', text=value[:head].decode())]
    if version == 1:
        end = head + 2 + number(value[head:head + 2])
        return [*parts, part(value[head:head + 2], 'etcd length', length=end - head - 2),
                *sealed_parts(value[head + 2:end], 'read', 'etcd', 'data key'), *gcm(value[end:])]
    return parts + message_parts(value[head:], schema(kms.Etcd.EncryptedObject.DESCRIPTOR), 'EncryptedObject', 'read', 'etcd', {
        'encrypted_data': lambda data: [part(data[:32], 'info'), *gcm(data[32:])],
        'encrypted_dek_source': lambda data: sealed_parts(data, 'read', 'etcd')}, who='value_open_v2')


# The part of Kubernetes' types that a small Secret needs: k8s.io/apimachinery/pkg/runtime, k8s.io/api/core/v1.
UNKNOWN = {1: ('typeMeta', {1: ('apiVersion', 'string'), 2: ('kind', 'string')}),
           2: ('raw', {1: ('metadata', {1: ('name', 'string'), 3: ('namespace', 'string')}),
                       2: ('data', {1: ('key', 'string'), 2: ('value', 'bytes')}), 3: ('type', 'string')}),
           3: ('contentEncoding', 'string'), 4: ('contentType', 'string')}


def object_parts(data):
    return [Part(data[:4], 'read', 'etcd', 'magic'), *message_parts(data[4:], UNKNOWN, 'Unknown', 'read', 'etcd', who='unseal')]


# -------------------------------------------------------------------- HTTP/2

class Reader:
    """Takes apart what one side says. HPACK's dynamic table lasts for the connection."""

    def __init__(self, side, anchor, greeted=False):
        self.side, self.anchor, self.mode = side, anchor, 'read' if side == 'client' else 'written'
        self.table, self.at, self.greeted = HeaderTable(), 0, greeted or side == 'server'
        self.where, self.kind = '', ''      # the place on the page, and the method that is called
        self.left, self.headed = set(), set()  # streams with a message that is not complete, and with a head
        self.messages = []                  # of each call: its method, and the message, or its beginning

    def part(self, data, name, drawn='', /, **values):
        return Part(data, self.mode, self.where, name, drawn, **values)

    def who(self, name, alone):
        """Who handles a header of a header block."""
        key = name if name in TEXTS['headers'] else 'other'
        assert key != 'other' or self.where == 'exercise', f'[headers] lacks {name}'
        text, *who = TEXTS['headers'][key].split(' | ')
        return {'is': expand(text, self.where), 'who': who[-1] if name == 'grpc-status' and not alone else who[0]}

    def string(self, block, at, label, name, alone):
        coded = bool(block[at] & 128)
        drawn, length, used = integer(block[at:], 7, 'Huffman?', TEXTS['draw']['length'])
        end = at + used + length
        text = (decode_huffman(block[at + used:end]) if coded else block[at + used:end]).decode()
        drawn += huffman(block[at + used:end]) if coded else p('draw', 'ascii')
        return self.part(block[at:end], 'string', drawn, label=label, text=escape(text), **self.who(name or text, alone)), text, end

    def header(self, block, at, alone):
        """One header: its parts, its name and value, and where the next begins."""
        first, begin = block[at], at
        prefix, pattern = (7, 'a whole header') if first & 128 else (6, 'new, kept') if first & 64 else (4, 'new, not kept')
        index = decode_integer(block[at:], prefix)[0]
        table = 'static' if index <= STATIC_ENTRIES else 'dynamic'
        name, value = (part.decode() for part in self.table.get_by_index(index)) if index else ('', '')
        meaning = words('draw', 'entry' if first & 128 else 'entry name' if index else 'no entry', index=index, table=table, name=name)
        drawn, _, used = integer(block[at:], prefix, pattern, meaning + words('draw', 'said before', side=self.side) * (index > STATIC_ENTRIES))
        at += used
        if first & 128:
            return [self.part(block[begin:at], 'indexed', drawn, name=escape(name), value=escape(value), **self.who(name, alone))], (name, value), at
        parts, shown = [], name
        if not index:
            label, name, at = self.string(block, at, 'name', None, alone)
            parts = [label]
        parts.insert(0, self.part(block[begin:begin + used], 'literal kept' if first & 64 else 'literal', drawn,
                                  name=escape(shown) or TEXTS['draw']['new name'], **self.who(name, alone)))
        part, value, at = self.string(block, at, 'value', name, alone)
        if first & 64:
            self.table.add(name.encode(), value.encode())
        return [*parts, part], (name, value), at

    def block(self, block, alone=True):
        """A header block: its parts, and its headers, as {name: (value, octets)}."""
        parts, headers, at = [], {}, 0
        while at < len(block):
            more, (name, value), end = self.header(block, at, alone)
            parts += more
            headers[name] = value, block[at:end]
            at = end
        return parts, headers

    def head(self, head):
        length, kind, flags, stream = number(head[:3]), head[3], head[4], number(head[5:])
        name, section, about, who = TEXTS['frames'][str(kind)].split(' | ')
        known, groups, rest = FLAGS.get(kind, {}), [], ''
        for bit in range(7, -1, -1):
            rest += str(flags >> bit & 1)
            if bit in known or bit == 0:
                groups += [(rest[:-1], 'unused', 'm')] * (len(rest) > 1) + [(rest[-1], known.get(bit, 'unused'), 'v' if rest[-1] == '1' else 'm')]
                rest = ''
        names = [flag for bit, flag in known.items() if flags >> bit & 1]
        drawn = words('draw', 'head', length_hex=head[:3].hex(' '), length=length, type_hex=head[3:4].hex(), type=kind, name=name,
                      flags_hex=head[4:5].hex(), flags=', '.join(names) or 'none is set', stream_hex=head[5:].hex(' '), stream=stream,
                      opens=TEXTS['draw']['stream' if stream else 'stream 0'])
        if known:
            drawn += p('draw', 'flags') + bits(head[4:5], *groups) + ''.join(p('draw', flag) for flag in names)
        if kind in (SETTINGS, PING) and flags & ACK:
            who = 'on_frame_recv via nghttp2 ; on_send' if kind == SETTINGS else 'nghttp2 ; on_send'
        return self.part(head, 'head', drawn, css=' head', about=expand(about, self.where), name=name, stream=stream, octets=length, section=section,
                         who=who, flags=''.join(f' <span class=flag>{flag}</span>' for flag in names))

    def data_parts(self, payload, stream):
        if stream in self.left:                 # a message that an earlier frame began
            return [self.part(payload, 'more of the message')]
        length, api = number(payload[1:5]), self.kind.split('.')[0]
        self.messages.append((self.kind, payload[5:]))
        parts = [self.part(payload[:1], 'not compressed'), self.part(payload[1:5], 'message length', length=length)]
        name = self.kind.split('/')[1] + ('Response' if self.mode == 'written' else 'Request')
        fields = schema(getattr(kms if api == 'v2' else kms.V1beta1, name).DESCRIPTOR)
        if len(payload) < 5 + length:           # the rest comes later: only the first field is shown
            self.left.add(stream)
            used = varint(payload[6:])[2]
            first = message_parts(payload[5:6 + used], fields, name, self.mode, self.where)
            return [*parts, *first, self.part(payload[6 + used:], 'zeros', who='kms_call via protobuf-c')] if first else parts
        opened = {part: lambda data: sealed_parts(data, self.mode, self.where, 'seed' if api == 'v2' else 'data key') for part in ('ciphertext', 'cipher')}
        return parts + message_parts(payload[5:], fields, name, self.mode, self.where, opened)

    def frame(self, data):
        """The parts of one frame, and a note for its end."""
        payload, kind, stream, note = data[9:], data[3], number(data[5:9]), ''
        parts = [self.head(data[:9])]
        if kind == SETTINGS:
            for at in range(0, len(payload), 6):
                key = number(payload[at:at + 2])
                name, about, source = TEXTS['settings'][str(key)].split(' | ')
                parts.append(self.part(payload[at:at + 6], 'setting', key=key, name=name, about=about, source=source, value=number(payload[at + 2:at + 6])))
        elif kind == HEADERS:
            before = len(self.table.dynamic_entries)
            more, headers = self.block(payload, stream not in self.headed)
            if ':path' in headers:              # '/v2.KeyManagementService/Encrypt'
                self.kind = headers[':path'][0].strip('/')
            self.headed.add(stream)
            parts += more
            note = self.table_note(len(self.table.dynamic_entries) - before)
        elif kind == DATA:
            parts += self.data_parts(payload, stream)
        elif kind == GOAWAY:
            parts += [self.part(payload[:4], 'last stream', stream=number(payload[:4])), self.part(payload[4:], 'no error')]
        elif payload:
            entry = {WINDOW_UPDATE: 'window', PING: 'ping', RST_STREAM: 'reset'}[kind]
            parts.append(self.part(payload, entry, number=f'{number(payload):,}', about=TEXTS['draw'][f'window {self.side}']))
        return parts, note

    def table_note(self, new):
        if not new:
            return ''
        entries = list(self.table.dynamic_entries)
        rows = ''.join(f'<tr{" class=new" * (n < new)}><td>{STATIC_ENTRIES + 1 + n}<td>{escape(name.decode())}<td>{escape(value.decode())}'
                       for n, (name, value) in enumerate(entries))
        return words('draw', 'table', side=self.side, new=new, rows=rows, entries='1 entry' if len(entries) == 1 else f'{len(entries)} entries')

    def said(self, data, where):
        """What one side says until the other speaks, a frame at a time: its parts, a note for its end, and its name."""
        self.where, at = where, 0
        if not self.greeted:
            self.greeted, at = True, len(PREFACE)
            assert data[:at] == PREFACE
            yield [self.part(PREFACE, 'preface', css=' head')], '', 'preface'
        while at < len(data):
            end = at + 9 + number(data[at:at + 3])
            parts, note = self.frame(data[at:end])
            assert b''.join(part.data for part in parts) == data[at:end], 'octets are left over'
            yield parts, note, TEXTS['frames'][str(data[at + 3])].split(' | ')[0] + ' ACK' * (data[at + 3] in (SETTINGS, PING) and data[at + 4] & ACK)
            at = end

    def html(self, data, where):
        """The same as a box for each frame, and the names of the frames."""
        found, names = '', []
        for parts, note, name in self.said(data, where):
            found += boxes(parts, self.anchor, self.at, note)
            self.at += sum(len(part.data) for part in parts)
            names.append(name)
        return found, names

    def text(self, data):
        """The same as lines of text."""
        for parts, _, _ in self.said(data, 'watch'):
            for part in parts:
                lines = part.hexes().splitlines()
                yield f'{self.at:6}  {lines[0]:26}  ' + unescape(re.sub('<[^>]*>', '', part.what))
                yield from (f'{"":6}  {line}' for line in lines[1:])
                self.at += len(part.data)
