"""Frames, header fields, gRPC's framing and flow control, with a client that can do it wrong."""
import os

import sealed
from plugin import KEK, ServerCase, key_id, kms
from raw import (ACK, CANCEL, CONTINUATION, DECRYPT, DECRYPT_V1, EMPTY, ENCRYPT, ENCRYPT_V1, EXHAUSTED, GET, HEADERS,
                 INITIAL_WINDOW_SIZE, INTERNAL, INVALID, MAX_CONCURRENT_STREAMS, OK, PREFACE, PRIORITY, PROTOCOL_ERROR,
                 REFUSED_STREAM, SETTINGS, STATUS, UNIMPLEMENTED, VERSION_V1, WINDOW, Raw, block, body_frames, data,
                 encrypt_v1, field, frame, headers, message, ping, request, reset, settings, window_update)
from sealed import V1


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

    def assert_reset(self, fields, body=EMPTY, trailers=None):
        """A stream error of type PROTOCOL_ERROR and no more: the connection goes on. Body and trailers are optional."""
        stream = self.raw.open(fields, end=not body and not trailers)
        if body:
            self.raw.send(data(stream, body, end=not trailers))
        if trailers:
            self.raw.send(self.raw.headers(stream, *trailers))
        answer = self.raw.wait(stream)
        self.assertEqual((answer.reset, answer.blocks), (PROTOCOL_ERROR, []), (fields, answer))
        self.assertTrue(self.raw.works())

    def assert_sealed(self, answer, plain):
        """What v1 Encrypt was asked for."""
        self.assert_status(answer, OK)
        cipher = kms.V1beta1.EncryptResponse.FromString(answer.data[5:]).cipher
        self.assertEqual(sealed.unseal(KEK, cipher, V1), plain)


class Connection(RawCase):
    def test_settings_come_first_and_at_once(self):
        raw = self.connect(hello=False)
        first = raw.frame()     # nothing was sent before this
        self.assertEqual((first.kind, first.flags & ACK), (SETTINGS, 0))
        self.assertEqual(raw.settings[MAX_CONCURRENT_STREAMS], 256)

    def test_ping_is_acknowledged(self):
        for octets in (bytes.fromhex('02041010090e0707'), bytes(8), os.urandom(8)):
            self.raw.ping(octets)
            self.assertEqual(self.raw.pongs, [octets])

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
                self.assert_status(self.raw.call(VERSION_V1, message(field(1, b'v1beta1')), authority=authority), OK)

    def test_what_grpc_go_sends(self):
        fields = request(STATUS, ('grpc-accept-encoding', 'gzip'), ('grpc-timeout', '2999943u'))
        fields.insert(5, ('user-agent', 'grpc-go/1.65.0'))
        stream = self.raw.open(fields)
        self.raw.send(data(stream, EMPTY, end=True), window_update(0, 5), ping(bytes.fromhex('02041010090e0707')))
        self.assert_status(self.raw.wait(stream), OK)

    def test_frames_that_mean_nothing(self):
        """Unknown frames and settings, PRIORITY, and windows that grow are borne."""
        self.raw.send(frame(0x42, 255, 0, b'abc'), settings([(0xabcd, 1)]), window_update(0, 1000),
                      frame(PRIORITY, 0, self.raw.stream + 2, b'\0\0\0\0\3'))
        self.assertTrue(self.raw.works())

    def test_a_call_that_is_cancelled(self):
        for body in (b'', data(1, EMPTY[:3]), data(1, message(b'x' * 100)[:50])):
            with Raw(self.server.path) as raw:
                raw.open(request(ENCRYPT))
                raw.send(body, reset(1, CANCEL))
                self.assertTrue(raw.works())

    def test_interleaved_calls(self):
        streams = [self.raw.open(request(STATUS)) for _ in range(100)]
        for part, end in ((EMPTY[:2], False), (EMPTY[2:], True)):
            self.raw.send(*(data(stream, part, end) for stream in reversed(streams)))
        for stream in streams:
            self.assert_status(self.raw.wait(stream), OK)

    def test_the_257th_stream_is_refused(self):
        self.assertTrue(self.raw.works())       # the settings are acknowledged
        streams = [self.raw.open(request(STATUS)) for _ in range(256)]
        answer = self.raw.wait(self.raw.open(request(STATUS), end=True))
        if answer.closed:       # RFC 9113, 5.4.1: a stream's error may be the connection's
            self.assertTrue(self.raw.goaways)
            return
        self.assertIn(answer.reset, (REFUSED_STREAM, PROTOCOL_ERROR), answer)
        self.raw.send(*(data(stream, EMPTY, end=True) for stream in streams))
        for stream in streams:
            self.assert_status(self.raw.wait(stream), OK)

    def test_not_http2_is_closed(self):
        for start in (b'GET / HTTP/1.1\r\nHost: x\r\n\r\n', b'\x16\x03\x01' + bytes(60), PREFACE[:-1] + b'x' + bytes(9)):
            with Raw(self.server.path, hello=False) as raw:
                raw.send(start)
                raw.wait_closed()
        self.assertTrue(self.raw.works())

    def test_broken_frames_end_the_connection_only(self):
        for broken in (frame(SETTINGS, 0, 0, b'x'), frame(6, 0, 0, bytes(7)), b'\xff\xff\xff\0\0\0\0\0\1',
                       window_update(0, 0), frame(HEADERS, 5, 1, b'\xff'),  # which HPACK refuses
                       frame(HEADERS, 5, 2, b'\x82'),                       # a stream of the server's
                       frame(5, 4, 1, b'\0\0\0\2\x82'),                     # PUSH_PROMISE, which is no client's
                       frame(CONTINUATION, 4, 1, b'\x82')):
            with self.subTest(broken=broken[:10].hex()), Raw(self.server.path) as raw:
                raw.send(broken)
                raw.wait_closed()
                self.assertTrue(raw.goaways)
        self.assertTrue(self.raw.works())


class Splits(RawCase):
    """The same bytes in every possible portion."""
    bodies = ((STATUS, EMPTY, OK), (ENCRYPT, message(field(1, b'0123456789abcdef') + field(2, b'u')), OK),
              (ENCRYPT_V1, encrypt_v1(b'ping'), OK), (DECRYPT, message(field(1, bytes(80)) + field(3, b'k')), INVALID))

    def dialogue(self, *parts):
        """Four calls in these portions, each of which the server reads by itself."""
        with Raw(self.server.path, hello=False) as raw:
            streams = [raw.expect() for _ in self.bodies]
            for part in parts:
                raw.send(part)
                raw.drained()
            answers = [raw.wait(stream) for stream in streams]
            for answer, (_, _, code) in zip(answers, self.bodies):
                self.assert_status(answer, code)
            self.assert_sealed(answers[2], b'ping')

    def test_split_everywhere(self):
        whole, with_table = PREFACE + settings(), Raw(self.server.path)
        with with_table:        # for its encoder: the later calls lean on the HPACK table
            for i, (path, body, _) in enumerate(self.bodies):
                whole += with_table.headers(2 * i + 1, request(path)) + body_frames(2 * i + 1, body)
        for cut in range(1, len(whole)):
            self.dialogue(whole[:cut], whole[cut:])
        self.dialogue(*(whole[at:at + 1] for at in range(len(whole))))

    def test_data_frames_of_one_byte(self):
        stream = self.raw.open(request(ENCRYPT_V1))
        for byte in encrypt_v1(b'ping'):
            self.raw.send(data(stream, bytes([byte])), data(stream))
        self.raw.send(data(stream, end=True))
        self.assert_sealed(self.raw.wait(stream), b'ping')

    def test_headers_in_continuations(self):
        stream = self.raw.expect()
        self.raw.send(self.raw.headers(stream, request(STATUS), chunk=20), data(stream, EMPTY, end=True))
        self.assert_status(self.raw.wait(stream), OK)

    def test_padding(self):
        stream = self.raw.open(request(STATUS))
        self.raw.send(data(stream, EMPTY, end=True, pad=200))
        self.assert_status(self.raw.wait(stream), OK)

    def test_trailers_of_a_request(self):
        """Legal in HTTP/2, of no use in gRPC: borne."""
        stream = self.raw.open(request(STATUS))
        self.raw.send(data(stream, EMPTY), self.raw.headers(stream, [('x-checksum', '1')], end=True))
        self.assert_status(self.raw.wait(stream), OK)


class HeaderRules(RawCase):
    """RFC 9113, sections 8.2 and 8.3."""

    def test_good_fields_are_borne(self):
        for fields in ((('x-note', ''),), (('x-note', 'a\tb \xe9'),), (('x-note', 'a'),) * 3,
                       (("x!#$%&'*+-.^_`|~", 'a'),), (('cookie', 'a'), ('cookie', 'b')),
                       (('content-length', '5'),), (('host', 'elsewhere'),)):
            with self.subTest(fields=fields):
                self.assert_status(self.raw.call(STATUS, EMPTY, *fields), OK)

    def test_malformed_heads(self):
        good, regular = request(STATUS), ('x-note', '1')
        names = [b'X-Upper', b'x-uppeR', b'a b', b'x\0', b'x\r\n', b'x\x7f', b'x\xe9', b'a:b', b'', b'connection',
                 b'keep-alive', b'proxy-connection', b'transfer-encoding', b'upgrade']
        bad = [good + [(name, b'close')] for name in names]
        bad += [good + [('x-note', value)] for value in ('a\0b', 'a\rb', 'a\nb', ' a', 'a ', '\ta', 'a\t')]
        bad += [good[:-1] + [('te', value)] for value in ('gzip', 'trailers, gzip', 'trailersx', '')]
        bad += [good[:i] + good[i + 1:] for i in range(3)] + [good[4:]]                 # a pseudo-header field is missing,
        bad += [[pair] + good for pair in good[:4]] + [good + [pair] for pair in good[:4]]  # is there twice,
        bad += [good[:i] + good[i + 1:] + [good[i]] for i in range(4)] + [[regular] + good]  # behind a regular one,
        bad += [[(name, '200')] + good for name in (':status', ':protocol', ':version', ':', ':Path')]    # or unknown
        bad += [[(n, value if n == which else v) for n, v in good] for which, value in
                ((':path', ''), (':path', 'relative'), (':method', ''), (':scheme', ''))]
        for fields in bad:
            with self.subTest(fields=fields):
                self.assert_reset(fields)

    def test_content_length(self):
        for value in ('4', '6', '0', '-5', '5x', '', '+5', '99999999999999999999999', '18446744073709551621', '0x5'):
            with self.subTest(value=value):
                self.assert_reset(request(STATUS, ('content-length', value)))
        self.assert_reset(request(STATUS, ('content-length', '5')), b'')
        self.assert_reset(request(STATUS, ('content-length', '5'), ('content-length', '6')))

    def test_malformed_trailers(self):
        for fields in ([(':path', STATUS)], [(':status', '200')], [('X-Upper', '1')], [('connection', 'close')]):
            with self.subTest(fields=fields):
                self.assert_reset(request(STATUS), EMPTY[:3], (fields, True))
        self.assert_reset(request(STATUS), EMPTY[:3], ([('x-note', '1')], False))   # no END_STREAM

    @staticmethod
    def list_of(size):
        """Header fields that count as `size` bytes in RFC 9113 6.5.2."""
        fields = request(STATUS)
        left = size - sum(len(n) + len(v) + 32 for n, v in fields)
        while left > 0:
            value = left - 33 if left < 3000 else 2000
            fields.append(('x', 'v' * value))
            left -= value + 33
        return fields

    def test_header_lists(self):
        """16 KiB, after HPACK: more is refused, and the connection goes on."""
        for size, code in ((15000, OK), (16383, OK), (16384, OK), (16385, EXHAUSTED), (17000, EXHAUSTED), (40000, EXHAUSTED)):
            with self.subTest(size=size):
                stream = self.raw.expect()
                self.raw.send(headers(stream, block(self.list_of(size))), data(stream, EMPTY, end=True))
                answer = self.raw.wait(stream)
                if code == OK or answer.reset is None:
                    self.assert_status(answer, code)
                self.assertTrue(self.raw.works())
        for name, extra in (('one', [('x-note', 'n' * 17000)]), ('indexed', [('x-note', 'n' * 3000)] * 6),
                            ('many', [(f'x-{i}', '1') for i in range(450)])):
            with self.subTest(name=name):
                answer = self.raw.call(STATUS, EMPTY, *extra)
                if answer.reset is None:
                    self.assert_status(answer, EXHAUSTED)
                self.assertTrue(self.raw.works())


class Http(RawCase):
    def test_405(self):
        for method in ('PUT', 'DELETE', 'OPTIONS', 'PATCH', 'post', 'GETX'):
            for path, allow in ((STATUS, 'POST'), ('/metrics', 'GET, HEAD'), ('/', 'POST')):
                with self.subTest(method=method, path=path):
                    answer = self.raw.call(path, b'', method=method)
                    self.assertEqual((answer.http, answer.blocks[0].get('allow')), ('405', allow), answer)

    def test_get(self):
        for path in ('/', '/metrics/', '/metricsx', '/healthz', '/METRICS', STATUS):
            with self.subTest(path=path):
                self.assertEqual(self.raw.get(path).http, '404')
        for path in ('/metrics', '/metrics?x=1', '/metrics?'):
            with self.subTest(path=path):
                page, head = self.raw.get(path), self.raw.call(path, b'', **{**GET, 'method': 'HEAD'})
                self.assertIn(b'\nkmsplugin_connections ', page.data)
                self.assertEqual((head.http, head.data, head.ended), ('200', b'', True))
                self.assertEqual(head.blocks[0]['content-type'], page.blocks[0]['content-type'])

    def test_content_types(self):
        for good in ('application/grpc', 'application/grpc+proto', 'Application/GRPC', 'application/grpc;charset=utf-8', 'application/grpc+proto;x'):
            self.assert_status(self.raw.call(STATUS, content_type=good), OK)
        for bad in (None, '', 'text/plain', 'application/json', 'application/grpcx', 'application/grpc+json',
                    'application/grpc-web', 'application/grp', 'application/grpc+', ';'):
            with self.subTest(kind=bad):
                answer = self.raw.call(STATUS, content_type=bad)
                self.assertEqual((answer.http, answer.ended), ('415', True), answer)

    def test_unknown_methods(self):
        for path in ('/', '/x', '/v2.KeyManagementService', '/v2.KeyManagementService/', STATUS.lower(), STATUS + '/', '/V2' + STATUS[3:], '*',
                     STATUS + 'X', STATUS[:-1], STATUS + '?x', '/v1.KeyManagementService/Version',
                     '/v1beta1.KeyManagementService/Status', '/v2.KeyManagementService/Version', '/' + STATUS,
                     '/metrics', '/grpc.health.v1.Health/Check', '/peer-%00%0a-bytes'):
            with self.subTest(path=path):
                answer = self.raw.call(path)
                self.assert_status(answer, UNIMPLEMENTED)
                self.assertNotIn('peer-', answer.message)


class Messages(RawCase):
    """gRPC's framing and what it carries."""

    def test_not_one_message(self):
        good = encrypt_v1(b'ping')
        bodies = {'none': b'', 'half a prefix': good[:3], 'prefix alone': good[:5], 'truncated': good[:-1],
                  'two': good * 2, 'one and a bit': good + b'\0', 'two empty': EMPTY * 2, 'three': good * 3}
        for name, body in bodies.items():
            with self.subTest(name=name):
                self.assert_status(self.raw.call(ENCRYPT_V1, body), INTERNAL)
        stream = self.raw.open(request(STATUS))
        self.raw.send(data(stream, end=True))
        self.assert_status(self.raw.wait(stream), INTERNAL)

    def test_undecodable(self):
        bodies = {'field past the end': b'\x0a\x05ab', 'length missing': b'\x0a', 'tag without end': b'\xff' * 11,
                  'wire type 7': b'\x0f\0', 'huge length': b'\x0a\xff\xff\xff\xff\x0f', 'tag 0': b'\x00\x00',
                  'half a varint': b'\x78\x80', 'half a double': b'\x79\0\0', 'a group': b'\x0b\x0c', 'garbage': b'\xff\xff\xff'}
        for name, body in bodies.items():
            for path in (STATUS, ENCRYPT, DECRYPT, VERSION_V1, ENCRYPT_V1, DECRYPT_V1):
                with self.subTest(name=name, path=path):
                    self.assert_status(self.raw.call(path, message(body)), INTERNAL)
        good = field(1, sealed.seal(KEK, b'seed', sealed.V2)) + field(3, key_id(KEK).encode())
        self.assert_status(self.raw.call(DECRYPT, message(good + field(4, b'\x0a\x05ab'))), INTERNAL)
        self.assert_status(self.raw.call(ENCRYPT, message(b'\x08\x05')), INTERNAL)     # a plaintext that is a varint

    def test_fields_that_are_missing_or_repeated(self):
        for path, code in ((STATUS, OK), (ENCRYPT, OK), (DECRYPT, INVALID), (VERSION_V1, INVALID), (ENCRYPT_V1, INVALID), (DECRYPT_V1, INVALID)):
            self.assert_status(self.raw.call(path, EMPTY), code)
        self.assert_status(self.raw.call(DECRYPT_V1, message(field(1, b'v1beta1'))), INVALID)
        self.assert_sealed(self.raw.call(ENCRYPT_V1, message(field(1, b'v1beta1') + field(2, b'a') + field(2, b'b'))), b'b')

    def test_uids_are_not_judged(self):
        for uid in (b'', 'a\u00e9\u20ac\U0001f511'.encode(), b'\x7f\x01', b'\xff\xc3('):
            self.assert_status(self.raw.call(ENCRYPT, message(field(1, b'x') + field(2, uid))), OK)

    def test_compressed(self):
        for extra in ((), (('grpc-encoding', 'gzip'),)):
            answer = self.raw.call(ENCRYPT, message(field(1, b'x'), flag=1), *extra)
            self.assert_status(answer, UNIMPLEMENTED)
            self.assertEqual([b.get('grpc-accept-encoding') for b in answer.blocks][-1:], ['identity'])
        for flag in (2, 3, 0x80, 0xff):
            answer = self.raw.call(ENCRYPT, message(field(1, b'x'), flag=flag))
            self.assertIn(answer.status, (UNIMPLEMENTED, INTERNAL), answer)

    def test_too_long_by_its_prefix(self):
        """The prefix is enough for a refusal: the body never comes, the stream stays open."""
        for length in ('00010001', '00100000', '7fffffff', '80000000', 'ffffffff'):
            with self.subTest(length=length):
                stream = self.raw.open(request(ENCRYPT_V1))
                self.raw.send(data(stream, b'\0' + bytes.fromhex(length)))
                self.assert_status(self.raw.wait(stream), EXHAUSTED)
        self.assertTrue(self.raw.works())

    def test_longest_message(self):
        body = encrypt_v1(bytes(65536 - 9 - 4))
        self.assertEqual(len(body), 5 + 65536)
        self.assert_status(self.raw.call(ENCRYPT_V1, body), INVALID)
        self.assert_status(self.raw.call(ENCRYPT_V1, message(body[5:] + b'\0')), EXHAUSTED)

    def test_errors_hold_no_peer_bytes(self):
        marker = b'PEERBYTES'
        for path, body in ((ENCRYPT, field(1, marker * 200)), (DECRYPT, field(1, marker * 10)),
                           (DECRYPT, field(1, sealed.seal(KEK, b'', sealed.V2)) + field(3, marker)),
                           (VERSION_V1, field(1, marker)), (ENCRYPT_V1, field(1, marker)),
                           (DECRYPT_V1, field(1, b'v1beta1') + field(2, marker * 10))):
            answer = self.raw.call(path, message(body))
            self.assert_status(answer, INVALID)
            self.assertNotIn('PEERBYTES', answer.message)


class FlowControl(RawCase):
    def test_small_windows(self):
        plain = os.urandom(967)
        for grant in (1, 10):
            answer = self.connect(window=1, grant=grant).call(ENCRYPT_V1, encrypt_v1(plain))
            self.assert_sealed(answer, plain)
            self.assertGreater(answer.shape.count('DATA'), 1000 // grant)

    def test_window_of_nothing_then_settings(self):
        raw = self.connect(window=0, grant=0)
        stream = raw.open(request(STATUS))
        raw.upload(stream, EMPTY)
        raw.ping()
        self.assertEqual(raw.answers[stream].data, b'')
        raw.ours[stream] += 4096
        raw.send(settings([(INITIAL_WINDOW_SIZE, 4096)]))
        self.assert_status(raw.wait(stream), OK)

    def test_trailers_need_no_window(self):
        self.assert_status(self.connect(window=0, grant=0).call('/x/y'), UNIMPLEMENTED)

    def test_large_answers(self):
        """One answer is larger than a connection's first window, ten are ten times that."""
        plain = os.urandom(65000)
        for window, grant in ((WINDOW, WINDOW), (1000, 7777)):
            raw = self.connect(window=window, grant=grant)
            for _ in range(10):
                self.assert_sealed(raw.call(ENCRYPT_V1, encrypt_v1(plain)), plain)

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
            self.raw.send(data(stream, EMPTY, end=True, pad=250))
            self.raw.theirs[0] -= 256
            self.assert_status(self.raw.wait(stream), OK)
