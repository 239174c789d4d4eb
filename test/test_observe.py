"""What the plugin shows of itself: GET /metrics and the log."""
import os
import re
import time

from hyperframe.frame import DataFrame

import sealed
from plugin import (INVALID, KEK, MEMORY_MAX, NOT_FOUND, OTHER, OWN_MEMORY, STRANGER, Case, as_user,
                    key_id, needs_root, run, text, until)
from raw import DECRYPT, DECRYPT_V1, EMPTY, ENCRYPT, STATUS, Raw, field, message, request

SAMPLE = re.compile(r'([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? (\S+)')
PAIR = re.compile(r'([a-z0-9_]+)=("(?:[^"\\]|\\.)*"|\S*)')      # of a log line
LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\[\\"n])*)"')


def scrape(path):
    """The samples as {(name, frozenset of labels): value}; fails on what Prometheus would refuse."""
    with Raw(path) as raw:
        answer = raw.get('/metrics')
    assert answer.http == '200', answer
    assert re.fullmatch(r'text/plain; ?version=0\.0\.4(; ?charset=utf-8)?',
                        answer.blocks[0]['content-type']), answer.blocks
    assert answer.data.endswith(b'\n')
    samples, types, helped = {}, {}, set()
    for line in answer.data.decode().splitlines():
        if line.startswith('# HELP '):
            helped.add(line.split(' ')[2])
        elif line.startswith('# TYPE '):
            _, _, name, kind = line.split(' ')
            assert name not in types and kind in ('counter', 'gauge', 'histogram'), line
            types[name] = kind
        else:
            name, labels, value = SAMPLE.fullmatch(line).groups()
            family = re.sub('_(bucket|sum|count)$', '', name)
            assert types.get(name) or types.get(family) == 'histogram', f'without TYPE: {line}'
            pairs = LABEL.findall(labels or '')
            assert ','.join(f'{n}="{v}"' for n, v in pairs) == (labels or ''), line
            key = name, frozenset(pairs)
            assert key not in samples, f'twice: {line}'
            samples[key] = float(value)
    assert set(types) == helped, (types, helped)
    return samples


def value(samples, name, **labels):
    return samples.get((name, frozenset(labels.items())))


def calls(samples, service, method, code):
    return value(samples, 'kmsplugin_grpc_requests_total', service=service, method=method, code=code)


class Metrics(Case):
    def test_requests_total(self):
        server = self.start()
        rpc = self.client(server)
        for _ in range(3):
            rpc.status()
        answer = rpc.encrypt(b'x')
        rpc.decrypt(answer.ciphertext, answer.key_id)
        rpc.version()
        for _ in range(2):
            cipher = rpc.encrypt_v1(b'x')
            self.fails(INVALID, rpc.encrypt, bytes(1000))
        rpc.decrypt_v1(cipher)
        self.fails(NOT_FOUND, rpc.decrypt, sealed.seal(OTHER, b'', sealed.V2), key_id(OTHER))
        self.fails(INVALID, rpc.decrypt_v1, b'short')
        samples = scrape(server.path)
        for service, method, code, count in (
                ('v2', 'Status', 'OK', 3), ('v2', 'Encrypt', 'OK', 1), ('v2', 'Decrypt', 'OK', 1),
                ('v2', 'Encrypt', 'INVALID_ARGUMENT', 2), ('v2', 'Decrypt', 'NOT_FOUND', 1),
                ('v1beta1', 'Version', 'OK', 1), ('v1beta1', 'Encrypt', 'OK', 2),
                ('v1beta1', 'Decrypt', 'OK', 1), ('v1beta1', 'Decrypt', 'INVALID_ARGUMENT', 1)):
            self.assertEqual(calls(samples, service, method, code), count, (service, method, code))
        for method in ('Status', 'Encrypt', 'Decrypt'):
            self.assertFalse(calls(samples, 'v2', method, 'INTERNAL'))
        rpc.status()
        self.assertEqual(calls(scrape(server.path), 'v2', 'Status', 'OK'), 4)

    def test_errors_below_the_methods_count(self):
        server = self.start()
        with Raw(server.path) as raw:
            self.assertEqual(raw.call(STATUS, b'').status, 13)
            self.assertEqual(raw.call(ENCRYPT, message(b'x', flag=1)).status, 12)
            stream = raw.open(request(ENCRYPT))
            raw.send(DataFrame(stream, b'\0\xff\0\0\0'))
            self.assertEqual(raw.wait(stream).status, 8)
        samples = scrape(server.path)
        self.assertEqual(calls(samples, 'v2', 'Status', 'INTERNAL'), 1)
        self.assertEqual(calls(samples, 'v2', 'Encrypt', 'UNIMPLEMENTED'), 1)
        self.assertEqual(calls(samples, 'v2', 'Encrypt', 'RESOURCE_EXHAUSTED'), 1)

    def test_peers_make_no_labels(self):
        server = self.start()
        scrape(server.path)
        before = set(scrape(server.path))
        with Raw(server.path) as raw:
            for i in range(50):
                self.assertEqual(raw.call(f'/invented{i}.Service/Invented{i}').status, 12)
        more = set(scrape(server.path)) - before
        self.assertLessEqual(len(more), 20, more)
        self.assertNotIn('invented', str(more).lower())

    def test_durations(self):
        server = self.start()
        rpc = self.client(server)
        for _ in range(5):
            rpc.status()
        samples = scrape(server.path)
        name, labels = 'kmsplugin_grpc_request_duration_seconds', {'service': 'v2', 'method': 'Status'}
        self.assertEqual(value(samples, name + '_count', **labels), 5)
        total = value(samples, name + '_sum', **labels)
        self.assertTrue(0 < total < 5 * 20, total)
        buckets = {}
        for (sample, pairs), count in samples.items():
            pairs = dict(pairs)
            if sample == name + '_bucket' and labels.items() <= pairs.items():
                buckets[float(pairs['le'].replace('+Inf', 'inf'))] = count
        self.assertGreaterEqual(len(buckets), 3)
        self.assertEqual(buckets[float('inf')], 5)
        counts = [buckets[bound] for bound in sorted(buckets)]
        self.assertEqual(counts, sorted(counts))

    def test_connections(self):
        server = self.start()
        before = value(scrape(server.path), 'kmsplugin_connections')
        raws = [Raw(server.path) for _ in range(3)]
        for raw in raws:
            self.addCleanup(raw.close)
            self.assertTrue(raw.works())
        self.assertEqual(value(scrape(server.path), 'kmsplugin_connections'), before + 3)
        for raw in raws:
            raw.close()
        until(lambda: value(scrape(server.path), 'kmsplugin_connections') == before,
              'closed connections are not counted')

    @needs_root
    def test_refused_peers(self):
        server = self.start('--allow-uid', f'0,{STRANGER}')
        self.assertEqual(value(scrape(server.path), 'kmsplugin_refused_peers_total'), 0)
        other = self.start('--allow-uid', '0', '--mode', '0666')
        for _ in range(2):
            self.assertEqual(run('probe', 'unix://' + other.path,
                                 wrapper=as_user(STRANGER), env={}).returncode, 1)
        self.assertGreaterEqual(value(scrape(other.path), 'kmsplugin_refused_peers_total'), 2)

    def test_of_the_process(self):
        begin = time.time()
        server = self.start(kek=f'{text(KEK)},{text(OTHER)}')
        samples = scrape(server.path)
        started = value(samples, 'process_start_time_seconds')
        self.assertTrue(begin - 5 < started < time.time() + 5, (begin, started))
        resident = value(samples, 'process_resident_memory_bytes')
        self.assertTrue(server.resident() / 2 < resident < server.resident() * 2, resident)
        if OWN_MEMORY:
            self.assertLess(resident, MEMORY_MAX)
        self.assertEqual(value(samples, 'kmsplugin_key_info', key_id=key_id(KEK)), 1)

    def test_large_page_through_a_small_window(self):
        server = self.start()
        with Raw(server.path, window=1, grant=13) as raw:
            answer = raw.get('/metrics')
        self.assertEqual(answer.http, '200')
        self.assertIn(b'process_start_time_seconds', answer.data)


class Log(Case):
    """That every line is logfmt with the time first, Server.stop asserts for all tests."""

    def test_ready(self):
        server = self.start()
        line = server.wait_log(r'\bmsg=ready\b')[0].string
        self.assertIn(f' endpoint=unix://{server.path}', line)
        self.assertIn(f' key_id={key_id(KEK)}', line)
        stamp = time.strptime(line[5:24], '%Y-%m-%dT%H:%M:%S')
        self.assertLess(abs(time.mktime(stamp) - time.mktime(time.gmtime())), 60)

    def test_debug(self):
        server = self.start('--log-level', 'debug')
        rpc = self.client(server)
        rpc.status()
        answer = rpc.encrypt(b'x', uid='uid-of-encrypt')
        rpc.decrypt(answer.ciphertext, answer.key_id, uid='uid-of-decrypt')
        self.fails(INVALID, rpc.decrypt, b'', 'x')
        rpc.version()
        rpc.decrypt_v1(rpc.encrypt_v1(b'x'))
        lines = [dict(PAIR.findall(m.string)) for m in server.wait_log(r'\bmsg=rpc\b', 7)]
        v2, v1 = '/v2.KeyManagementService/', '/v1beta1.KeyManagementService/'
        self.assertEqual([(line['method'], line['code']) for line in lines],
                         [(v2 + 'Status', 'OK'), (v2 + 'Encrypt', 'OK'), (v2 + 'Decrypt', 'OK'),
                          (v2 + 'Decrypt', 'INVALID_ARGUMENT'), (v1 + 'Version', 'OK'),
                          (v1 + 'Encrypt', 'OK'), (v1 + 'Decrypt', 'OK')])
        self.assertEqual([line['uid'] for line in lines[1:3]], ['uid-of-encrypt', 'uid-of-decrypt'])
        self.assertEqual([line['key_id'] for line in lines[1:3]], [key_id(KEK)] * 2)
        for line in lines:
            self.assertEqual(line['level'], 'debug')
            self.assertLess(int(line['us']), 20e6)

    def test_no_rpc_lines_below_debug(self):
        for level in (('--log-level', 'info'), ()):
            server = self.start(*level)
            self.client(server).encrypt(b'x')
            server.stop()
            self.assertNotIn('msg=rpc', server.log())

    def test_peer_bytes_are_escaped(self):
        server = self.start('--log-level', 'debug')
        rpc = self.client(server)
        evil = ('two words', 'a"b', 'a\\', 'a\nlevel=error msg=forged', '\x1b[31mred', '\r', '\x7f',
                '\t', 'a=b', '\u202eright to left', '\u2028', '', '"', 'x' * 60000)
        for uid in evil:
            rpc.encrypt(b'x', uid=uid)
            self.fails(INVALID, rpc.decrypt, bytes(57), uid)
        with Raw(server.path) as raw:
            for path in ('/a b"c\\d\x1b', '/\xe9', '/' + 'p' * 5000):
                raw.call(path)
            body = field(1, b'') + field(2, b'\xff\xfe\n')
            self.assertEqual(raw.call(ENCRYPT, message(body)).status, 13)
        server.wait_log('msg=rpc', 2 * len(evil))
        server.stop()
        self.assertNotRegex(server.log(), r'(?m)^level=error|^red|[\x00-\x09\x0b-\x1f\x7f]')
        self.assertEqual([line for line in server.lines if not line.startswith('time=')], [])

    def test_never_plaintext(self):
        server = self.start('--log-level', 'debug')
        rpc = self.client(server)
        answer = rpc.encrypt(b'PLAINTEXT-IN-A-LOG')
        rpc.decrypt(answer.ciphertext, answer.key_id)
        self.fails(INVALID, rpc.encrypt, b'PLAINTEXT-IN-A-LOG' * 99)
        with Raw(server.path) as raw:
            raw.call(ENCRYPT, message(field(1, b'PLAINTEXT-IN-A-LOG') + b'\x0a\x99'))
        server.stop()
        self.assertNotIn('PLAINTEXT', server.log())
        self.assertNotIn(text(KEK)[:10], server.log())
        self.assertNotIn(KEK.hex()[:16], server.log())

    def test_peers_cause_no_errors(self):
        server = self.start()
        with Raw(server.path) as raw:
            raw.call('/x')
            raw.send(b'\0\0\1\4\0\0\0\0\0x')
            raw.wait_closed()
        self.client(server).status()
        server.stop()
        self.assertNotIn('level=error', server.log())


class Traces(Case):
    """Who encrypts or decrypts leaves a line in the log, and a count by uid."""

    def used(self, server, **wanted):
        """The pairs of the lines on uses that have these values."""
        lines = [dict(PAIR.findall(line)) for line in server.lines if ' msg=used ' in line]
        return [line for line in lines if all(line[name] == value for name, value in wanted.items())]

    def test_the_first_use_and_the_rest_at_the_end(self):
        server = self.start(kek=f'{text(KEK)},{text(OTHER)}')
        with Raw(server.path) as raw:
            for _ in range(3):
                self.assertEqual(raw.call(STATUS, EMPTY).status, 0)
            for _ in range(5):
                self.assertEqual(raw.call(ENCRYPT, message(field(1, b'x'))).status, 0)
            first = server.wait_log('msg=used')
            self.assertEqual(len(first), 1)
            self.assertRegex(first[0].string, r'level=info msg=used pid=\d+ uid=\d+ service=v2 method=Encrypt '
                             rf'key_id={key_id(KEK)} count=1 failed=0$')
            self.assertIn(f'pid={os.getpid()} uid={os.geteuid()} ', first[0].string)
            v1 = sealed.seal(KEK, b'x', sealed.V1)
            self.assertEqual(raw.call(DECRYPT_V1, message(field(1, b'v1beta1') + field(2, v1))).status, 0)
            self.assertEqual(raw.call(DECRYPT_V1, message(field(1, b'v1beta1') + field(2, v1[:-1]))).status, 3)
        server.wait_log(r'method=Encrypt .* count=4 failed=0')
        server.wait_log(r'service=v1beta1 method=Decrypt .* count=1 failed=0')
        server.wait_log(rf'service=v1beta1 method=Decrypt key_id={key_id(KEK)} count=1 failed=1')
        self.assertEqual([line['method'] for line in self.used(server)],
                         ['Encrypt', 'Decrypt', 'Encrypt', 'Decrypt'])
        samples, uid = scrape(server.path), str(os.geteuid())
        self.assertEqual(value(samples, 'kmsplugin_kek_uses_total', uid=uid, service='v2', method='Encrypt'), 5)
        self.assertEqual(value(samples, 'kmsplugin_kek_uses_total', uid=uid, service='v1beta1', method='Decrypt'), 2)
        self.assertEqual(value(samples, 'kmsplugin_kek_use_failures_total', uid=uid, service='v1beta1', method='Decrypt'), 1)
        self.assertIsNone(value(samples, 'kmsplugin_kek_uses_total', uid=uid, service='v2', method='Status'))

    def test_another_kek_has_a_line_of_its_own(self):
        server = self.start(kek=f'{text(KEK)},{text(OTHER)}')
        with Raw(server.path) as raw:
            for kek in (KEK, KEK, OTHER):
                body = field(1, sealed.seal(kek, b'x', sealed.V2)) + field(3, key_id(kek).encode())
                self.assertEqual(raw.call(DECRYPT, message(body)).status, 0)
        server.wait_log(f'key_id={key_id(OTHER)} count=1 failed=0')
        self.assertEqual([line['count'] for line in self.used(server, key_id=key_id(KEK))], ['1', '1'])

    def test_keks_in_turn(self):
        """Each has a line at its first use, and a burst of them no more: as when an API server starts after a rotation."""
        server = self.start(kek=f'{text(KEK)},{text(OTHER)}')
        with Raw(server.path) as raw:
            for i in range(100):
                kek = (KEK, OTHER)[i % 2]
                body = field(1, sealed.seal(kek, b'x', sealed.V2)) + field(3, key_id(kek).encode())
                self.assertEqual(raw.call(DECRYPT, message(body)).status, 0)
        server.wait_log('key_id=several count=98 failed=0')
        self.assertEqual([(line['key_id'], line['count']) for line in self.used(server)],
                         [(key_id(KEK), '1'), (key_id(OTHER), '1'), ('several', '98')])

    @needs_root
    def test_a_flood_hides_no_other_user(self):
        """One uid uses up its lines; what another does is logged, and what was left out is told."""
        server = self.start('--mode', '0666', '--allow-uid', f'0,{STRANGER}')
        os.seteuid(STRANGER)
        try:
            raws = [Raw(server.path) for _ in range(130)]
        finally:
            os.seteuid(0)
        for raw in [*raws, Raw(server.path)]:
            with raw:
                self.assertEqual(raw.call(ENCRYPT, message(field(1, b'x'))).status, 0)
        server.wait_log('msg=used.* uid=0 ')
        server.stop()
        told, left_out = len(self.used(server, uid=str(STRANGER))), server.wait_log('msg="lines left out" count=([0-9]+)')
        self.assertEqual(told + sum(int(m[1]) for m in left_out), 130)
        self.assertLess(told, 130)

    def test_a_flood_of_connections_does_not_fill_the_log(self):
        server = self.start()
        for _ in range(300):
            with Raw(server.path) as raw:
                self.assertEqual(raw.call(ENCRYPT, message(field(1, b'x'))).status, 0)
        samples = scrape(server.path)
        self.assertEqual(value(samples, 'kmsplugin_kek_uses_total', uid=str(os.geteuid()), service='v2', method='Encrypt'), 300)
        server.stop()
        lines = len(self.used(server))
        self.assertLessEqual(lines, 240)        # two minutes' worth, if one began meanwhile
        self.assertGreater(lines, 50)           # half of them are for root, where that is another user

    @needs_root
    def test_by_uid(self):
        """The first sixteen uids have series, the others one together."""
        uids = [STRANGER + i for i in range(18)]
        server = self.start('--mode', '0666', '--allow-uid', ','.join(map(str, [0, *uids])))
        for uid in uids:
            os.seteuid(uid)
            try:
                raw = Raw(server.path)
            finally:
                os.seteuid(0)
            with raw:
                self.assertEqual(raw.call(ENCRYPT, message(field(1, b'x'))).status, 0)
        samples = scrape(server.path)
        counts = {dict(labels)['uid']: n for (name, labels), n in samples.items() if name == 'kmsplugin_kek_uses_total'}
        self.assertEqual(counts, {**{str(uid): 1 for uid in uids[:15]}, 'other': 3})
        self.assertEqual([line['uid'] for line in self.used(server)], [str(uid) for uid in uids])
