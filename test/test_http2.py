"""Frames, header fields, gRPC's framing and flow control, with a client that can do it wrong."""
import os

from hyperframe.frame import (ContinuationFrame, DataFrame, PingFrame, PriorityFrame,
                              RstStreamFrame, SettingsFrame, WindowUpdateFrame)

import sealed
from plugin import KEK, Server, ServerCase, key_id, kms
from raw import (CANCEL, DECRYPT, DECRYPT_V1, EMPTY, ENCRYPT, ENCRYPT_V1, PREFACE, PROTOCOL_ERROR,
                 REFUSED_STREAM, STATUS, VERSION_V1, Raw, field, message, request)
from sealed import V1

# gRPC's numbers
OK, INVALID, DEADLINE, EXHAUSTED, UNIMPLEMENTED, INTERNAL = 0, 3, 4, 8, 12, 13


class RawCase(ServerCase):
    def setUp(self):
        self.raw = self.connect()

    def connect(self, **options):
        raw = Raw(self.server.path, **options)
        self.addCleanup(raw.close)
        return raw

    def assert_status(self, answer, code):
        """A complete gRPC answer with this code; an error also has a decent message."""
        self.assertEqual((answer.http, answer.status), ('200', code), answer)
        self.assertRegex(answer.blocks[0]['content-type'], r'\Aapplication/grpc(\+proto)?\Z')
        if code != OK:
            self.assertEqual(answer.data, b'')
            self.assertRegex(answer.message, r'\A([ -$&-~]|%[0-9A-Fa-f]{2}){8,}\Z')

    def assert_reset(self, fields, body=EMPTY, code=PROTOCOL_ERROR):
        """The stream is reset, and the connection goes on."""
        answer = self.raw.call_with(fields, body)
        self.assertEqual(answer.reset, code, (fields, answer))
        self.assertEqual(answer.blocks, [])
        self.assertTrue(self.raw.works())


class Connection(RawCase):
    def test_settings_come_first_and_at_once(self):
        raw = self.connect(hello=False)
        frame = raw.frame()     # nothing was sent before this
        self.assertIsInstance(frame, SettingsFrame)
        self.assertNotIn('ACK', frame.flags)
        self.assertEqual(frame.settings[SettingsFrame.MAX_CONCURRENT_STREAMS], 256)

    def test_ping_is_acknowledged(self):
        for data in (bytes.fromhex('02041010090e0707'), bytes(8), os.urandom(8)):
            self.raw.ping(data)
            self.assertEqual(self.raw.pongs, [data])

    def test_shape_of_an_answer(self):
        answer = self.raw.call(STATUS)
        self.assertEqual(answer.shape, ['HEADERS', 'DATA', 'HEADERS+END'])
        self.assert_status(answer, OK)
        self.assertNotIn('grpc-status', answer.blocks[0])
        self.assertEqual([n for n in answer.blocks[1] if n.startswith(':')], [])
        self.assertEqual(answer.data[:5], message(answer.data[5:])[:5])
        status = kms.StatusResponse.FromString(answer.data[5:])
        self.assertEqual((status.healthz, status.key_id), ('ok', key_id(KEK)))

    def test_shape_of_an_error(self):
        answer = self.raw.call('/v2.KeyManagementService/Nothing')
        self.assertEqual(answer.shape[0], 'HEADERS+END')
        self.assert_status(answer, UNIMPLEMENTED)

    def test_authority_in_all_forms(self):
        for authority in ('localhost', '%2Frun%2Fkms.sock', '/run/kms.sock', '@name', '', None):
            with self.subTest(authority=authority):
                self.assert_status(self.raw.call(STATUS, authority=authority), OK)
                self.assert_status(self.raw.call(VERSION_V1, message(field(1, b'v1beta1')),
                                                 authority=authority), OK)

    def test_what_grpc_go_sends(self):
        fields = [(':method', 'POST'), (':scheme', 'http'), (':path', STATUS),
                  (':authority', 'localhost'), ('content-type', 'application/grpc'),
                  ('user-agent', 'grpc-go/1.65.0'), ('te', 'trailers'),
                  ('grpc-accept-encoding', 'gzip'), ('grpc-timeout', '2999943u')]
        stream = self.raw.open(fields)
        self.raw.send(DataFrame(stream, EMPTY, flags=['END_STREAM']), WindowUpdateFrame(
            0, window_increment=5), PingFrame(opaque_data=bytes.fromhex('02041010090e0707')))
        self.assert_status(self.raw.wait(stream), OK)

    def test_content_types(self):
        for good in ('application/grpc', 'application/grpc+proto'):
            self.assert_status(self.raw.call(STATUS, content_type=good), OK)

    def test_frames_that_mean_nothing(self):
        """Unknown frames and settings, PRIORITY, and windows that grow are borne."""
        unknown = b'\0\0\3\x42\xff\0\0\0\0abc'
        setting = b'\0\0\6\4\0\0\0\0\0\xab\xcd\0\0\0\1'
        stream = self.raw.stream + 2
        self.raw.send(unknown, setting, PriorityFrame(stream, depends_on=0, stream_weight=3),
                      WindowUpdateFrame(0, window_increment=1000))
        self.assertTrue(self.raw.works())

    def test_priority_of_the_connection(self):
        """RFC 9113 6.3: of stream 0 it is an error of the connection, and the log says so."""
        server = Server('--log-level', 'debug')
        self.addCleanup(server.stop)
        with Raw(server.path) as raw:
            self.assertTrue(raw.works())
            raw.send(bytes([0, 0, 5, 2, 0, 0, 0, 0, 0]) + bytes(5))
            raw.wait_closed()
            self.assertEqual([goaway.error_code for goaway in raw.goaways], [PROTOCOL_ERROR])
        server.wait_log(r'msg=closed .* reason="protocol error" code=1$')
        with Raw(server.path) as raw:
            raw.send(bytes([0, 0, 5, 2, 0, 0, 0, 0, 3]) + bytes(5))
            self.assertTrue(raw.works())

    def test_a_call_that_is_cancelled(self):
        for data in ((), (EMPTY[:3],), (message(b'x' * 100)[:50],)):
            stream = self.raw.open(request(ENCRYPT))
            self.raw.send(*(DataFrame(stream, d) for d in data),
                          RstStreamFrame(stream, error_code=CANCEL))
            self.assertTrue(self.raw.works())

    def test_interleaved_calls(self):
        streams = [self.raw.open(request(STATUS)) for _ in range(100)]
        for part in (EMPTY[:2], EMPTY[2:]):
            for stream in reversed(streams):
                end = ['END_STREAM'] if part == EMPTY[2:] else []
                self.raw.send(DataFrame(stream, part, flags=end))
        for stream in streams:
            self.assert_status(self.raw.wait(stream), OK)

    def test_the_257th_stream_is_refused(self):
        self.assertTrue(self.raw.works())       # the settings are acknowledged
        streams = [self.raw.open(request(STATUS)) for _ in range(256)]
        extra = self.raw.open(request(STATUS), end=True)
        answer = self.raw.wait(extra)
        if answer.closed:       # RFC 9113, 5.4.1: a stream's error may be the connection's
            self.assertTrue(self.raw.goaways)
            return
        self.assertIn(answer.reset, (REFUSED_STREAM, PROTOCOL_ERROR), answer)
        for stream in streams:
            self.raw.send(DataFrame(stream, EMPTY, flags=['END_STREAM']))
        for stream in streams:
            self.assert_status(self.raw.wait(stream), OK)

    def test_not_http2_is_closed(self):
        for start in (b'GET / HTTP/1.1\r\nHost: x\r\n\r\n', b'\x16\x03\x01' + bytes(60),
                      PREFACE[:-1] + b'x' + bytes(9)):
            with Raw(self.server.path, hello=False) as raw:
                raw.send(start)
                raw.wait_closed()
        self.assertTrue(self.raw.works())

    def test_broken_frames_end_the_connection_only(self):
        for broken in (b'\0\0\1\4\0\0\0\0\0x',                  # SETTINGS of one byte
                       b'\0\0\7\6\0\0\0\0\0' + bytes(7),        # PING of seven
                       b'\xff\xff\xff\0\0\0\0\0\1',             # DATA of 16 MiB
                       b'\0\0\4\x08\0\0\0\0\0' + bytes(4),      # WINDOW_UPDATE of 0
                       b'\0\0\1\1\5\0\0\0\1\xff',               # HEADERS that HPACK refuses
                       b'\0\0\1\1\5\0\0\0\2\x82',               # a stream of the server's
                       b'\0\0\5\5\4\0\0\0\1\0\0\0\2\x82',   # PUSH_PROMISE, which is no client's
                       ContinuationFrame(1, b'\x82').serialize()):
            with self.subTest(broken=broken[:10].hex()), Raw(self.server.path) as raw:
                raw.send(broken)
                raw.wait_closed()
                self.assertTrue(raw.goaways)
        self.assertTrue(self.raw.works())


class Splits(RawCase):
    """The same bytes in every possible pair of portions."""

    def bytes_of_a_call(self):
        head = self.raw.header_frames(1, request(ENCRYPT_V1), False)
        body = message(field(1, b'v1beta1') + field(2, b'ping'))
        data = DataFrame(1, body, flags=['END_STREAM'])
        return PREFACE + b''.join(f.serialize() for f in (SettingsFrame(), *head, data))

    def assert_answered(self, raw):
        answer = raw.wait(raw.stream)
        self.assert_status(answer, OK)
        cipher = kms.V1beta1.EncryptResponse.FromString(answer.data[5:]).cipher
        self.assertEqual(sealed.unseal(KEK, cipher, V1), b'ping')

    def test_split_in_two_everywhere(self):
        whole = self.bytes_of_a_call()
        for position in range(1, len(whole)):
            with Raw(self.server.path, hello=False) as raw:
                raw.expect()
                raw.send(whole[:position])
                raw.drained()
                raw.send(whole[position:])
                self.assert_answered(raw)

    def test_byte_by_byte(self):
        with Raw(self.server.path, hello=False) as raw:
            raw.expect()
            for byte in self.bytes_of_a_call():
                raw.send(bytes([byte]))
                raw.drained()
            self.assert_answered(raw)

    def test_data_frames_of_one_byte(self):
        body = message(field(1, b'v1beta1') + field(2, b'ping'))
        stream = self.raw.open(request(ENCRYPT_V1))
        for byte in body:
            self.raw.send(DataFrame(stream, bytes([byte])), DataFrame(stream, b''))
        self.raw.send(DataFrame(stream, b'', flags=['END_STREAM']))
        self.assert_status(self.raw.wait(stream), OK)

    def test_headers_in_continuations(self):
        stream = self.raw.expect()
        head = self.raw.header_frames(stream, request(STATUS), False, chunk=20)
        self.assertGreater(len(head), 2)
        self.raw.send(*head, DataFrame(stream, EMPTY, flags=['END_STREAM']))
        self.assert_status(self.raw.wait(stream), OK)

    def test_padding(self):
        stream = self.raw.open(request(STATUS))
        self.raw.send(DataFrame(stream, EMPTY, pad_length=200, flags=['PADDED', 'END_STREAM']))
        self.assert_status(self.raw.wait(stream), OK)

    def test_trailers_of_a_request(self):
        """Legal in HTTP/2, of no use in gRPC: borne."""
        stream = self.raw.open(request(STATUS))
        self.raw.send(DataFrame(stream, EMPTY),
                      *self.raw.header_frames(stream, [('x-checksum', '1')], True))
        self.assert_status(self.raw.wait(stream), OK)


class MalformedHeaders(RawCase):
    """RFC 9113, sections 8.2 and 8.3: the stream is reset with PROTOCOL_ERROR."""

    def test_field_names(self):
        for name in ('X-Upper', 'x-uppeR', 'a b', 'x\0', 'x\r\n', 'x\x7f', 'x\xe9', 'a:b', ''):
            with self.subTest(name=name):
                self.assert_reset(request(STATUS) + [(name.encode('latin-1'), b'1')])

    def test_field_values(self):
        for value in ('a\0b', 'a\rb', 'a\nb', ' a', 'a ', '\ta', 'a\t'):
            with self.subTest(value=value):
                self.assert_reset(request(STATUS, ('x-note', value)))

    def test_good_fields_are_borne(self):
        for fields in ((('x-note', ''),), (('x-note', 'a\tb \xe9'),), (('x-note', 'a'),) * 3,
                       (("x!#$%&'*+-.^_`|~", 'a'),), (('cookie', 'a'), ('cookie', 'b')),
                       (('content-length', '5'),), (('host', 'elsewhere'),)):
            with self.subTest(fields=fields):
                self.assert_status(self.raw.call(STATUS, EMPTY, *fields), OK)

    def test_connection_specific_fields(self):
        for name in ('connection', 'keep-alive', 'proxy-connection', 'transfer-encoding', 'upgrade'):
            with self.subTest(name=name):
                self.assert_reset(request(STATUS, (name, 'close')))

    def test_te(self):
        for value in ('gzip', 'trailers, gzip', 'trailersx', ''):
            with self.subTest(value=value):
                fields = [f for f in request(STATUS) if f[0] != 'te']
                self.assert_reset(fields + [('te', value)])

    def test_missing_pseudo_fields(self):
        for missing in (':method', ':scheme', ':path'):
            with self.subTest(missing=missing):
                self.assert_reset([f for f in request(STATUS) if f[0] != missing])
        self.assert_reset([f for f in request(STATUS) if f[0][0] != ':'])
        self.assert_reset(request(''))

    def test_pseudo_fields_twice(self):
        fields = request(STATUS)
        for twice in fields[:4]:
            with self.subTest(twice=twice):
                self.assert_reset([twice] + fields)

    def test_unknown_pseudo_fields(self):
        for name in (':status', ':protocol', ':version', ':', ':Path'):
            with self.subTest(name=name):
                self.assert_reset([(name, '200')] + request(STATUS))

    def test_pseudo_field_after_a_regular_one(self):
        fields = request(STATUS)
        for place in range(4):
            with self.subTest(name=fields[place][0]):
                moved = fields[:place] + fields[place + 1:] + [fields[place]]
                self.assert_reset(moved)

    def test_content_length(self):
        for value in ('4', '6', '0', '-5', '5x', '', '+5', '99999999999999999999999', '0x5'):
            with self.subTest(value=value):
                self.assert_reset(request(STATUS, ('content-length', value)))
        self.assert_reset(request(STATUS, ('content-length', '5')), b'')

    def test_pseudo_field_in_trailers(self):
        for fields in ([(':path', STATUS)], [(':status', '200')], [('X-Upper', '1')],
                       [('connection', 'close')]):
            with self.subTest(fields=fields):
                stream = self.raw.open(request(STATUS))
                self.raw.send(DataFrame(stream, EMPTY[:3]),
                              *self.raw.header_frames(stream, fields, True))
                self.assertEqual(self.raw.wait(stream).reset, PROTOCOL_ERROR)
                self.assertTrue(self.raw.works())

    def test_second_headers_without_end(self):
        stream = self.raw.open(request(STATUS))
        self.raw.send(DataFrame(stream, EMPTY[:3]),
                      *self.raw.header_frames(stream, [('x-note', '1')], False))
        self.assertEqual(self.raw.wait(stream).reset, PROTOCOL_ERROR)
        self.assertTrue(self.raw.works())

    def test_long_header_lists(self):
        """More than 16 KiB on the wire, or after HPACK: refused, and the connection goes on."""
        lists = {'one field': [('x-note', 'n' * 17000)],
                 'many fields': [(f'x-{i}', '1') for i in range(450)],
                 'indexed': [('x-note', 'n' * 3000)] * 6}
        for name, extra in lists.items():
            with self.subTest(name=name):
                answer = self.raw.call(STATUS, EMPTY, *extra)
                if answer.reset is None:
                    self.assert_status(answer, EXHAUSTED)
                self.assertTrue(self.raw.works())

    def test_header_list_below_the_limit(self):
        self.assert_status(self.raw.call(STATUS, EMPTY, ('x-note', 'n' * 15000)), OK)


class Http(RawCase):
    def test_405(self):
        for method in ('PUT', 'DELETE', 'HEAD', 'OPTIONS', 'PATCH', 'post', 'GETX'):
            for path in (STATUS, '/metrics', '/'):
                with self.subTest(method=method, path=path):
                    answer = self.raw.call(path, b'', method=method)
                    self.assertEqual(answer.http, '405', answer)

    def test_404(self):
        for path in ('/', '/metrics/', '/metricsx', '/healthz', '/METRICS', STATUS):
            with self.subTest(path=path):
                self.assertEqual(self.raw.get(path).http, '404')

    def test_415(self):
        for kind in (None, '', 'text/plain', 'application/json', 'application/grpcx',
                     'application/grpc+json', 'application/grpc-web', 'application/grp'):
            with self.subTest(kind=kind):
                answer = self.raw.call(STATUS, content_type=kind)
                self.assertEqual(answer.http, '415', answer)
                self.assertTrue(answer.ended)

    def test_unknown_methods(self):
        for path in ('/', '/x', '/v2.KeyManagementService', '/v2.KeyManagementService/',
                     '/v2.KeyManagementService/status', '/v2.KeyManagementService/Status/',
                     '/v2.KeyManagementService/StatusX', '/v2.KeyManagementService/Statu',
                     '/v2.KeyManagementService/Status?x', '/v1.KeyManagementService/Version',
                     '/v1beta1.KeyManagementService/Status', '/v2.KeyManagementService/Version',
                     '//v2.KeyManagementService/Status', '/metrics',
                     '/grpc.health.v1.Health/Check', '/peer-%00%0a-bytes'):
            with self.subTest(path=path):
                answer = self.raw.call(path)
                self.assert_status(answer, UNIMPLEMENTED)
                self.assertNotIn('peer-', answer.message)


class Messages(RawCase):
    """gRPC's framing and what it carries."""

    def test_not_one_message(self):
        good = message(field(1, b'v1beta1') + field(2, b'ping'))
        bodies = {'none': b'', 'half a prefix': good[:3], 'prefix alone': good[:5],
                  'truncated': good[:-1], 'two': good * 2, 'one and a bit': good + b'\0',
                  'two empty': EMPTY * 2, 'three': good * 3}
        for name, body in bodies.items():
            with self.subTest(name=name):
                self.assert_status(self.raw.call(ENCRYPT_V1, body), INTERNAL)
        stream = self.raw.open(request(STATUS))
        self.raw.send(DataFrame(stream, b'', flags=['END_STREAM']))
        self.assert_status(self.raw.wait(stream), INTERNAL)

    def test_undecodable(self):
        bodies = {'field past the end': b'\x0a\x05ab', 'length missing': b'\x0a',
                  'tag without end': b'\xff' * 11, 'wire type 7': b'\x0f\0',
                  'huge length': b'\x0a\xff\xff\xff\xff\x0f', 'tag 0': b'\x00\x00',
                  'half a varint': b'\x78\x80', 'half a double': b'\x79\0\0'}
        for name, body in bodies.items():
            for path in (STATUS, ENCRYPT, DECRYPT, VERSION_V1, ENCRYPT_V1, DECRYPT_V1):
                with self.subTest(name=name, path=path):
                    self.assert_status(self.raw.call(path, message(body)), INTERNAL)

    def test_undecodable_annotations(self):
        good = sealed.seal(KEK, b'seed', sealed.V2)
        body = field(1, good) + field(3, key_id(KEK).encode()) + field(4, b'\x0a\x05ab')
        self.assert_status(self.raw.call(DECRYPT, message(body)), INTERNAL)

    def test_invalid_utf8(self):
        cipher = field(1, sealed.seal(KEK, b'seed', sealed.V2))
        identity = field(3, key_id(KEK).encode())
        for bad in (b'\xff', b'a\x80', b'\xc3', b'\xc3(', b'\xc0\x80', b'\xe0\x80\x80',
                    b'\xed\xa0\x80', b'\xf0\x80\x80\x80', b'\xf4\x90\x80\x80', b'\xf8\x88\x80\x80\x80'):
            for path, body in ((ENCRYPT, field(1, b'x') + field(2, bad)),
                               (DECRYPT, cipher + identity + field(2, bad)),
                               (DECRYPT, cipher + field(3, bad)),
                               (DECRYPT, cipher + identity + field(4, field(1, bad))),
                               (VERSION_V1, field(1, bad)), (ENCRYPT_V1, field(1, bad)),
                               (DECRYPT_V1, field(1, bad))):
                with self.subTest(path=path, bad=bad.hex()):
                    self.assert_status(self.raw.call(path, message(body)), INTERNAL)

    def test_valid_utf8(self):
        for good in ('', 'a\u00e9\u20ac\U0001f511', '\x7f\x01', '\uffff\U0010ffff'):
            body = field(1, b'x') + field(2, good.encode())
            self.assert_status(self.raw.call(ENCRYPT, message(body)), OK)

    def test_compressed(self):
        for extra in ((), (('grpc-encoding', 'gzip'),)):
            answer = self.raw.call(ENCRYPT, message(field(1, b'x'), flag=1), *extra)
            self.assert_status(answer, UNIMPLEMENTED)
            accepted = [b['grpc-accept-encoding'] for b in answer.blocks
                        if 'grpc-accept-encoding' in b]
            self.assertEqual(accepted, ['identity'])

    def test_other_flags(self):
        for flag in (2, 3, 0x80, 0xff):
            answer = self.raw.call(ENCRYPT, message(field(1, b'x'), flag=flag))
            self.assertIn(answer.status, (UNIMPLEMENTED, INTERNAL), answer)

    def test_too_long_by_its_prefix(self):
        """The prefix is enough for a refusal: the body never comes, the stream stays open."""
        for length in ('00010001', '00100000', '7fffffff', '80000000', 'ffffffff'):
            with self.subTest(length=length):
                stream = self.raw.open(request(ENCRYPT_V1))
                self.raw.send(DataFrame(stream, b'\0' + bytes.fromhex(length)))
                self.assert_status(self.raw.wait(stream), EXHAUSTED)
        self.assertTrue(self.raw.works())

    def test_longest_message(self):
        body = field(1, b'v1beta1') + field(2, bytes(65536 - 9 - 4))
        self.assertEqual(len(body), 65536)
        self.assert_status(self.raw.call(ENCRYPT_V1, message(body)), INVALID)
        self.assert_status(self.raw.call(ENCRYPT_V1, message(body + b'\0')), EXHAUSTED)

    def test_errors_hold_no_peer_bytes(self):
        marker = b'PEERBYTES'
        for path, body in ((ENCRYPT, field(1, marker * 200)), (DECRYPT, field(1, marker * 10)),
                           (DECRYPT, field(1, sealed.seal(KEK, b'', sealed.V2)) + field(3, marker)),
                           (VERSION_V1, field(1, marker)), (ENCRYPT_V1, field(1, marker)),
                           (DECRYPT_V1, field(1, b'v1beta1') + field(2, marker * 10))):
            answer = self.raw.call(path, message(body))
            self.assert_status(answer, INVALID)
            self.assertNotIn('PEERBYTES', answer.message)


class Timeouts(RawCase):
    def test_every_unit(self):
        for value in ('1H', '1M', '10S', '9000m', '2999943u', '99999999u', '99999999n', '99999999H',
                      '00000001H'):
            with self.subTest(value=value):
                self.assert_status(self.raw.call(STATUS, EMPTY, ('grpc-timeout', value)), OK)

    def test_malformed(self):
        """Whatever is made of them, it is the same for all, and it is an answer."""
        codes = {}
        for value in ('', '5', 'S', '-1S', '+1S', '123456789S', '1x', '1 S', '1.5S', '1s', 'S1',
                      '1SS', '0x1S'):
            answer = self.raw.call(STATUS, EMPTY, ('grpc-timeout', value))
            self.assertIn(answer.status, (OK, INVALID, INTERNAL), (value, answer))
            codes.setdefault(answer.status, []).append(value)
        self.assertEqual(len(codes), 1, codes)

    def test_short_deadlines(self):
        """The body never comes."""
        streams = {value: self.raw.open(request(STATUS, ('grpc-timeout', value)))
                   for value in ('300m', '300000u', '99999999n', '0S', '1n')}
        half = self.raw.open(request(ENCRYPT, ('grpc-timeout', '300m')))
        self.raw.send(DataFrame(half, EMPTY[:4]))
        for stream in (*streams.values(), half):
            self.assert_status(self.raw.wait(stream), DEADLINE)
        self.assertTrue(self.raw.works())


class FlowControl(RawCase):
    def test_window_of_one_byte(self):
        for grant in (1, 10):
            raw = self.connect(window=1, grant=grant)
            plain = os.urandom(967)
            answer = raw.call(ENCRYPT, message(field(1, plain)))
            self.assert_status(answer, OK)
            self.assertGreater(answer.shape.count('DATA'), 1000 // grant)
            sealed_ = kms.EncryptResponse.FromString(answer.data[5:]).ciphertext
            self.assertEqual(sealed.unseal(KEK, sealed_, sealed.V2), plain)

    def test_window_of_nothing_then_settings(self):
        raw = self.connect(window=0, grant=0)
        stream = raw.open(request(STATUS))
        raw.upload(stream, EMPTY)
        raw.ping()
        self.assertEqual(raw.answers[stream].data, b'')
        raw.ours[stream] += 4096
        raw.send(SettingsFrame(settings={SettingsFrame.INITIAL_WINDOW_SIZE: 4096}))
        self.assert_status(raw.wait(stream), OK)

    def test_trailers_need_no_window(self):
        raw = self.connect(window=0, grant=0)
        self.assert_status(raw.call('/x/y'), UNIMPLEMENTED)

    def test_large_answers(self):
        """One answer is larger than a connection's first window, ten are ten times that."""
        plain = os.urandom(65000)
        for window, grant in ((65535, 65535), (1000, 7777)):
            raw = self.connect(window=window, grant=grant)
            for _ in range(10):
                answer = raw.call(ENCRYPT_V1, message(field(1, b'v1beta1') + field(2, plain)))
                self.assert_status(answer, OK)
                cipher = kms.V1beta1.EncryptResponse.FromString(answer.data[5:]).cipher
                self.assertEqual(sealed.unseal(KEK, cipher, V1), plain)

    def test_large_requests(self):
        """One request is larger than a stream's first window may be."""
        plain = os.urandom(65466)
        cipher = sealed.seal(KEK, plain, V1)
        for _ in range(20):
            answer = self.raw.call(DECRYPT_V1, message(field(1, b'v1beta1') + field(2, cipher)))
            self.assert_status(answer, OK)
            self.assertEqual(kms.V1beta1.DecryptResponse.FromString(answer.data[5:]).plain, plain)

    def test_padding_counts_in_windows(self):
        """Padding, and bodies of refused calls, must be given back to the connection's window."""
        for _ in range(40):
            stream = self.raw.open(request('/refused/Method'))
            self.raw.upload(stream, bytes(4096))
            self.raw.wait(stream)
        for _ in range(400):
            stream = self.raw.open(request(STATUS))
            while self.raw.theirs[0] < 256 + 5:
                self.assertIsNotNone(self.raw.frame())
            self.raw.send(DataFrame(stream, EMPTY, pad_length=250, flags=['PADDED', 'END_STREAM']))
            self.raw.theirs[0] -= 256
            self.assert_status(self.raw.wait(stream), OK)
