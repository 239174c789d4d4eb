"""Octets in annotated rows: what each one is, where that is written, which function of kmsplugin.c handles it.

A row is (octets, what, source, function).
"""
from hpack.hpack import decode_integer
from hpack.huffman_table import decode_huffman
from hpack.table import HeaderTable

from plugin import kms

PREFACE = b'PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n'
DATA, HEADERS, SETTINGS, GOAWAY = 0, 1, 4, 7
FRAMES = {DATA: 'DATA', HEADERS: 'HEADERS', 3: 'RST_STREAM', SETTINGS: 'SETTINGS', 6: 'PING', GOAWAY: 'GOAWAY',
          8: 'WINDOW_UPDATE'}
END_STREAM, ACK, END_HEADERS = 1, 1, 4
SETTING_NAMES = {1: 'HEADER_TABLE_SIZE', 2: 'ENABLE_PUSH', 3: 'MAX_CONCURRENT_STREAMS', 4: 'INITIAL_WINDOW_SIZE',
                 5: 'MAX_FRAME_SIZE', 6: 'MAX_HEADER_LIST_SIZE', 9: 'NO_RFC7540_PRIORITIES'}

STATIC_ENTRIES = 61
HUFFMAN = ('', ' (Huffman)')

HTTP2, HPACK = 'RFC 9113 ', 'RFC 7541 '
GRPC, PROTOBUF = 'gRPC', 'protobuf'
XAES, GCM, HKDF, KUBERNETES, KMSPLUGIN = 'C2SP XAES', 'SP 800-38D', 'RFC 5869 2.3', 'Kubernetes', 'kmsplugin.c'

# Which function looks at a field of a request, and which writes one of a response.
READ_BY = {':method': 'request_known', ':scheme': 'request_known', ':path': 'request_path',
           ':authority': 'request_known', 'content-type': 'request_known', 'te': 'request_known',
           'grpc-timeout': 'grpc_timeout_us', 'user-agent': 'request_field'}
WRITTEN_BY = {':status': 'stream_answer', 'content-type': 'stream_answer', 'grpc-status': 'on_data_source_read'}


def number(octets):
    return int.from_bytes(octets, 'big')


def varint(data):
    """A varint of protobuf: its value and its length."""
    value = 0
    for at, octet in enumerate(data):
        value |= (octet & 127) << 7 * at
        if octet < 128:
            return value, at + 1
    raise ValueError('a varint without an end')


def sealed_rows(sealed, opens=False):
    """The sealed form, section Sealing of kmsplugin.c; `opens` if it is being opened."""
    form, fingerprint, nonce = (('sealed_shaped', 'ring_find', 'xaes_crypt') if opens
                                else ('seal', 'kek_init', 'random_nonce'))
    return [(sealed[:1], 'sealed form: format 1', KMSPLUGIN, form),
            (sealed[1:17], 'fingerprint of the KEK: its key_id', 'RFC 2104', fingerprint),
            (sealed[17:29], 'nonce, first half: makes the key', XAES, nonce),
            (sealed[29:41], 'nonce, second half: for AES-GCM', XAES, nonce),
            (sealed[41:-16], 'ciphertext', GCM, 'gcm_crypt'),
            (sealed[-16:], 'tag', GCM, 'gcm_crypt')]


def opened_rows(sealed):
    return sealed_rows(sealed, opens=True)


def gcm_rows(stored, function):
    """nonce, ciphertext and tag, as kube-apiserver writes them."""
    return [(stored[:12], 'nonce of AES-GCM', GCM, function),
            (stored[12:-16], 'ciphertext: the object', GCM, 'gcm_crypt'),
            (stored[-16:], 'tag', GCM, 'gcm_crypt')]


def message_rows(octets, descriptor, function, opened=None):
    """A protobuf message field by field; `opened` has a function for fields that have parts of their own."""
    rows, at = [], 0
    while at < len(octets):
        tag, size = varint(octets[at:])
        field, kind = descriptor.fields_by_number[tag >> 3], tag & 7
        value, more = varint(octets[at + size:])
        label = f'field {field.number}, {field.name}'
        if kind == 0:
            names = field.enum_type.values_by_number if field.enum_type else {}
            shown = names[value].name if value in names else value
            rows += [(octets[at:at + size], f'{label}: a varint follows', PROTOBUF, function),
                     (octets[at + size:at + size + more], str(shown), PROTOBUF, function)]
            at += size + more
            continue
        rows.append((octets[at:at + size + more], f'{label}: {value} octets follow', PROTOBUF, function))
        at += size + more
        content = octets[at:at + value]
        at += value
        if opened and field.name in opened:
            rows += opened[field.name](content)
        elif field.type == field.TYPE_STRING:
            rows.append((content, f'"{content.decode()}"', PROTOBUF, function))
        else:
            rows.append((content, 'its octets', PROTOBUF, function))
    return rows


def settings_rows(payload, function):
    rows = []
    for at in range(0, len(payload), 6):
        kind, value = number(payload[at:at + 2]), number(payload[at + 2:at + 6])
        source = 'RFC 9218 2.1' if kind == 9 else HTTP2 + '6.5.2'
        rows.append((payload[at:at + 6], f'{SETTING_NAMES[kind]} = {value}', source, function))
    return rows


def string_at(block, at):
    """A string of HPACK: its octets with those of the length, what it says, and whether in Huffman's code."""
    coded = bool(block[at] & 128)
    length, used = decode_integer(block[at:], 7)
    octets = block[at:at + used + length]
    content = bytes(octets[used:])
    return octets, (decode_huffman(content) if coded else content).decode(), coded


class Side:
    """What one side of a connection says, from its first octet on."""

    def __init__(self, name, method=None):
        self.name, self.method = name, method
        self.table = HeaderTable()      # HPACK's dynamic table of this direction
        self.at = 0                     # octets so far
        self.greeted = name == 'server'
        self.answers = {}               # stream: the class of the message that it carries

    def handler(self, name):
        return (WRITTEN_BY if self.name == 'server' else READ_BY).get(name, '')

    def field_row(self, block, at):
        """One field of a header block: its rows, and where the next one begins."""
        first = block[at]
        if first & 128:                                 # both name and value from a table
            index, used = decode_integer(block[at:], 7)
            name, value = (part.decode() for part in self.table.get_by_index(index))
            where = 'static' if index <= STATIC_ENTRIES else 'dynamic'
            return [(block[at:at + used], f'{where} entry {index}: {name}: {value}', HPACK + '6.1',
                     self.handler(name))], at + used, (name, value)
        kept = bool(first & 64)
        index, used = decode_integer(block[at:], 6 if kept else 4)
        rows, begin = [], at
        at += used
        kind = 'literal, kept' if kept else 'literal, not kept'
        section = HPACK + ('6.2.1' if kept else '6.2.3' if first & 16 else '6.2.2')
        if index:
            name = self.table.get_by_index(index)[0].decode()
            rows.append((block[begin:at], f'{kind}; name of entry {index}: {name}', section, self.handler(name)))
        else:
            octets, name, coded = string_at(block, at)
            rows.append((block[begin:at], f'{kind}; its name follows', section, self.handler(name)))
            rows.append((octets, f'name{HUFFMAN[coded]}: {name}', HPACK + '5.2', self.handler(name)))
            at += len(octets)
        octets, value, coded = string_at(block, at)
        rows.append((octets, f'value{HUFFMAN[coded]}: {value}', HPACK + '5.2', self.handler(name)))
        if kept:
            self.table.add(name.encode(), value.encode())
        return rows, at + len(octets), (name, value)

    def headers_rows(self, block, stream):
        rows, at = [], 0
        while at < len(block):
            more, at, (name, value) = self.field_row(block, at)
            rows += more
            if name == ':path':
                self.method = value.rsplit('/', 1)[1]
        return rows

    def data_rows(self, payload):
        server = self.name == 'server'
        message = getattr(kms, self.method + ('Response' if server else 'Request'))
        rows = [(payload[:1], 'not compressed', GRPC, 'grpc_prefix_write' if server else 'stream_prefix_end'),
                (payload[1:5], f'message of {number(payload[1:5])} octets', GRPC,
                 'grpc_prefix_write' if server else 'grpc_prefix_len')]
        function = 'answer_message' if server else 'kms_call'
        return rows + message_rows(payload[5:], message.DESCRIPTOR, function, {'ciphertext': sealed_rows if server else opened_rows})

    def frame_rows(self, head, payload):
        length, kind, flags, stream = number(head[:3]), head[3], head[4], number(head[5:])
        server = self.name == 'server'
        names = []
        if kind in (DATA, HEADERS):
            names = [name for bit, name in ((END_STREAM, 'END_STREAM'), (END_HEADERS, 'END_HEADERS')) if flags & bit]
        elif flags & ACK:
            names = ['ACK']
        shown = ' '.join([f'{FRAMES.get(kind, kind)}, length {length}, stream {stream},', *names]).rstrip(',')
        functions = {SETTINGS: ('on_frame_recv', 'session_init'), HEADERS: ('on_begin_headers', 'on_send'),
                     DATA: ('on_data_chunk_recv', 'on_send_data')}.get(kind, ('', ''))
        section = HTTP2 + {DATA: '6.1', HEADERS: '6.2', SETTINGS: '6.5'}.get(kind, '6')
        rows = [(head, shown, section, 'nghttp2' if names == ['ACK'] and server else functions[server])]
        if kind == SETTINGS:
            return rows + settings_rows(payload, 'session_init' if server else 'nghttp2')
        if kind == HEADERS:
            return rows + self.headers_rows(payload, stream)
        if kind == DATA:
            return rows + self.data_rows(payload)
        return rows + ([(payload, 'payload', section, '')] if payload else [])

    def rows(self, octets):
        """The rows of whole frames, the preface before the first if this is the client."""
        rows, at = [], 0
        if not self.greeted:
            self.greeted, at = True, len(PREFACE)
            assert octets[:at] == PREFACE
            rows.append((PREFACE, 'preface: PRI * HTTP/2.0, SM', HTTP2 + '3.4', 'conn_read'))
        while at < len(octets):
            head = octets[at:at + 9]
            end = at + 9 + number(head[:3])
            rows += self.frame_rows(head, octets[at + 9:end])
            at = end
        return rows

    def show(self, octets):
        """The same as lines of text; offsets count what this side has said before."""
        lines = table(self.rows(octets), self.at)
        self.at += len(octets)
        return lines


def table(rows, at=0):
    """Rows as lines: offset, octets, what they are, source and function. No octet is left out."""
    lines, width = [], 8
    for octets, what, source, function in rows:
        step = 9 if len(octets) == 9 else width         # the head of a frame in one line
        for begin in range(0, max(len(octets), 1), step):
            piece = octets[begin:begin + step]
            line = f'{at + begin:4}  {piece.hex(" "):26} '
            if begin == 0:
                line += f'{what:52} {source:14} {function}'
            lines.append(line.rstrip())
        at += len(octets)
    return lines
