"""What the plugin shows of itself: GET /metrics and the log."""
import json
import os
import re
import signal
import subprocess
import time

import sealed
from plugin import (BINARY, INVALID, KEK, NOT_FOUND, OTHER, SANITIZED, STRANGER, Case, as_user, environment, fresh_dir, key_id,
                    needs_root, run, text, until)
from raw import DECRYPT, DECRYPT_V1, EMPTY, ENCRYPT, STATUS, Raw, data, field, message, request

SAMPLE = re.compile(r'([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? (\S+)')
LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\[\\"n])*)"')
PAIR = re.compile(r'([^\s="]+)=("(?:[^"\\\x00-\x1f]|\\["\\/bfnrt]|\\u[0-9a-f]{4})*"|[^\s="]*)(?: |$)')


def pairs(line):
    """A log line as go-logfmt reads it, whose strings are those of JSON; fails where that would."""
    found, at = {}, 0
    while at < len(line):
        pair = PAIR.match(line, at)
        assert pair and pair[1] not in found, f'{line[at:]!r} in {line!r}'
        found[pair[1]] = json.loads(pair[2]) if pair[2].startswith('"') else pair[2]
        at = pair.end()
    return found


def events(server, msg):
    """The log lines of this event."""
    return [found for found in map(pairs, server.lines) if found['msg'] == msg]


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
            assert name not in types and kind in ('counter', 'gauge', 'summary', 'histogram'), line
            types[name] = kind
        else:
            name, labels, value = SAMPLE.fullmatch(line).groups()
            family = re.sub('_(bucket|sum|count)$', '', name)
            assert types.get(name) or types.get(family) in ('summary', 'histogram'), f'without TYPE: {line}'
            found = LABEL.findall(labels or '')
            assert ','.join(f'{n}="{v}"' for n, v in found) == (labels or ''), line
            key = name, frozenset(found)
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
            raw.send(data(stream, b'\0\xff\0\0\0'))
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
        self.assertTrue(0 < value(samples, name + '_sum', **labels) < 5 * 20)
        self.assertEqual(value(samples, name + '_count', service='v2', method='Decrypt'), 0)

    def test_connections(self):
        server = self.start()
        first = scrape(server.path)
        before = value(first, 'kmsplugin_connections')
        raws = [Raw(server.path) for _ in range(3)]
        for raw in raws:
            self.addCleanup(raw.close)
            self.assertTrue(raw.works())
        samples = scrape(server.path)
        self.assertEqual(value(samples, 'kmsplugin_connections'), before + 3)
        self.assertEqual(value(samples, 'kmsplugin_connections_total'), value(first, 'kmsplugin_connections_total') + 4)
        for raw in raws:
            raw.close()
        until(lambda: value(scrape(server.path), 'kmsplugin_connections') == before, 'closed connections are not counted')

    @needs_root
    def test_refused_peers(self):
        server = self.start('--allow-uid', '0', '--mode', '0666')
        self.assertEqual(value(scrape(server.path), 'kmsplugin_refused_peers_total'), 0)
        for _ in range(2):
            self.assertEqual(run('probe', 'unix://' + server.path, wrapper=as_user(STRANGER), env={}).returncode, 1)
        self.assertEqual(value(scrape(server.path), 'kmsplugin_refused_peers_total'), 2)

    def test_key_build_and_start(self):
        begin = time.time()
        server = self.start(kek=f'{text(KEK)},{text(OTHER)}')
        samples = scrape(server.path)
        self.assertTrue(begin - 5 < value(samples, 'process_start_time_seconds') < time.time() + 5)
        self.assertEqual(value(samples, 'kmsplugin_key_info', key_id=key_id(KEK)), 1)
        self.assertEqual(value(samples, 'kmsplugin_build_info', version=self.client(server).version().runtime_version), 1)

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

    def test_an_odd_endpoint(self):
        for name in ('two words', 'a="b', 'tab\t', 'b\\x41', '\u00e9'):
            server = self.start(path=f'{fresh_dir()}/{name}')
            endpoint = events(server, 'ready')[0]['endpoint'].encode('latin-1', 'ignore').decode('utf-8', 'replace')
            self.assertEqual(endpoint, 'unix://' + server.path)

    def test_debug(self):
        server = self.start('--log-level', 'debug')
        rpc = self.client(server)
        rpc.status()
        answer = rpc.encrypt(b'x', uid='uid-of-encrypt')
        rpc.decrypt(answer.ciphertext, answer.key_id, uid='uid-of-decrypt')
        self.fails(INVALID, rpc.decrypt, b'', 'x')
        rpc.version()
        rpc.decrypt_v1(rpc.encrypt_v1(b'x'))
        server.wait_log(r'\bmsg=rpc\b', 7)
        lines = events(server, 'rpc')
        v2, v1 = 'v2', 'v1beta1'
        self.assertEqual([(line['service'], line['method'], line['code']) for line in lines],
                         [(v2, 'Status', 'OK'), (v2, 'Encrypt', 'OK'), (v2, 'Decrypt', 'OK'), (v2, 'Decrypt', 'INVALID_ARGUMENT'),
                          (v1, 'Version', 'OK'), (v1, 'Encrypt', 'OK'), (v1, 'Decrypt', 'OK')])
        self.assertEqual([line['key_id'] for line in lines[1:3]], [key_id(KEK)] * 2)
        for line in lines:
            self.assertEqual(line['level'], 'debug')
            self.assertLess(int(line['us']), 20e6)
        for line, uid in zip(lines[1:], ('uid-of-encrypt', 'uid-of-decrypt')):
            names = [name for name, said in line.items() if said == uid]
            self.assertEqual(len(names), 1)
            self.assertNotEqual(names, ['uid'], 'that is the name of a uid of the kernel')
        server.stop()
        self.assertEqual({used['uid'] for used in events(server, 'used')}, {str(os.geteuid())})

    def test_no_rpc_lines_below_debug(self):
        for level in (('--log-level', 'info'), ()):
            server = self.start(*level)
            self.client(server).encrypt(b'x')
            server.stop()
            self.assertNotIn('msg=rpc', server.log())

    def test_errors_alone(self):
        path = fresh_dir() + '/kms.sock'
        with subprocess.Popen([BINARY, 'serve', '--listen', 'unix://' + path, '--log-level', 'error', *(('--sandbox', 'off') if SANITIZED else ())],
                              env=environment(KEK, None), stderr=subprocess.PIPE) as process:
            until(lambda: os.path.exists(path) and run('probe', 'unix://' + path).returncode == 0, 'it serves')
            process.terminate()
            self.assertEqual((process.stderr.read(), process.wait()), (b'', 0))

    def test_peer_bytes_are_read_back(self):
        """Whatever a peer sends is one value, as it was sent, to a parser; and no line, no pair, no terminal's command."""
        server = self.start('--log-level', 'debug')
        rpc = self.client(server)
        evil = ('two words', 'a"b', 'a\\', 'a\nlevel=error msg=forged', '\x1b[31mred', '\r', '\x7f', '\t', 'a=b', '', '"', '\\x41',
                '\u202eright to left', '\u2028', '\ufffd', 'x' * 60000)
        for uid in evil:
            rpc.encrypt(b'x', uid=uid)
            self.fails(INVALID, rpc.decrypt, bytes(57), uid)
        with Raw(server.path) as raw:
            for path in ('/a b"c\\d\x1b', '/\xe9', '/' + 'p' * 5000):
                raw.call(path)
            self.assertIn(raw.call(ENCRYPT, message(field(1, b'') + field(2, b'\xff\xfe\n'))).status, (0, 13))
        server.wait_log('msg=rpc', 2 * len(evil))
        server.stop()
        self.assertNotRegex(server.log(), r'(?m)^level=error|^red|[\x00-\x09\x0b-\x1f\x7f-\xff]')
        self.assertEqual([line for line in server.lines if not line.startswith('time=')], [])
        lines = events(server, 'rpc')
        for uid, line in zip(evil, lines[::2]):
            said = [value_of for value_of in line.values() if value_of.encode('latin-1', 'ignore').decode('utf-8', 'ignore') == uid]
            self.assertTrue(said or len(uid) > 60, (uid, line))

    def test_priorities_of_journald(self):
        """Where JOURNAL_STREAM is what standard error is, and nowhere else."""
        ours = ('sh', '-c', 'export JOURNAL_STREAM=$(stat -L -c %d:%i /proc/self/fd/2); exec "$0" "$@"')
        server = self.start('--listen', 'unix:///@' + os.urandom(8).hex(), wrapper=ours)
        server.signal(signal.SIGTERM)
        self.assertEqual(server.wait(), 0)
        server.kill()
        levels = {'debug': 7, 'info': 6, 'warn': 4, 'error': 3}
        for line in server.lines:
            self.assertEqual(line[:3], f'<{levels[pairs(line[3:])["level"]]}>')
        self.assertTrue({'<6>', '<4>'} <= {line[:3] for line in server.lines}, server.lines)
        self.assertRegex(run('serve', '--sandbox', 'off', '--listen', 'unix:///no/where/kms.sock', kek=KEK, wrapper=ours).stderr, r'\A<3>kmsplugin: .*\n\Z')
        for stream in ('1:2', '', 'nonsense', '0:0'):
            done = run('serve', '--sandbox', 'off', '--listen', 'unix:///no/where/kms.sock', kek=KEK, env={'JOURNAL_STREAM': stream})
            self.assertTrue(done.stderr.startswith('kmsplugin: '), done.stderr)

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
    """Who encrypts or decrypts leaves a line at the first use of a method on a connection, and one with the counts at its end."""

    def used(self, server):
        return [found for found in map(pairs, server.lines) if found['msg'].startswith('used')]

    def decrypt(self, raw, kek):
        body = field(1, sealed.seal(kek, b'x', sealed.V2)) + field(3, key_id(kek).encode())
        return raw.call(DECRYPT, message(body)).status

    def test_the_first_use_and_the_counts_at_the_end(self):
        server = self.start(kek=f'{text(KEK)},{text(OTHER)}')
        v1 = sealed.seal(KEK, b'x', sealed.V1)
        with Raw(server.path) as raw:
            for _ in range(3):
                self.assertEqual(raw.call(STATUS, EMPTY).status, 0)
            for _ in range(5):
                self.assertEqual(raw.call(ENCRYPT, message(field(1, b'x'))).status, 0)
            server.wait_log('msg=used')
            self.assertEqual(len(self.used(server)), 1)
            self.assertEqual(raw.call(DECRYPT_V1, message(field(1, b'v1beta1') + field(2, v1))).status, 0)
            self.assertEqual(raw.call(DECRYPT_V1, message(field(1, b'v1beta1') + field(2, v1[:-1]))).status, 3)
            self.assertEqual([self.decrypt(raw, kek) for kek in (OTHER, OTHER, OTHER)], [0] * 3)
        server.wait_log(r'msg="?used', 6)
        lines = self.used(server)
        for line in lines:
            self.assertEqual((line['level'], line['pid'], line['uid']), ('info', str(os.getpid()), str(os.geteuid())))
        key = {'Encrypt': key_id(KEK), 'Decrypt': key_id(OTHER)}
        self.assertEqual([(line['service'], line['method'], line['count'], line['failed']) for line in lines[:3]],
                         [('v2', 'Encrypt', '1', '0'), ('v1beta1', 'Decrypt', '1', '0'), ('v2', 'Decrypt', '1', '0')])
        self.assertEqual({(line['service'], line['method'], line['count'], line['failed']) for line in lines[3:]},
                         {('v2', 'Encrypt', '5', '0'), ('v1beta1', 'Decrypt', '2', '1'), ('v2', 'Decrypt', '3', '0')})
        self.assertEqual({line['key_id'] for line in lines if line['service'] == 'v2'}, set(key.values()))
        self.assertEqual([line['key_id'] for line in lines if line['method'] == 'Encrypt'], [key_id(KEK)] * 2)

    def test_a_connection_that_the_end_closes(self):
        server = self.start(kek=f'{text(KEK)},{text(OTHER)}')
        with Raw(server.path) as raw:
            self.assertEqual([self.decrypt(raw, kek) for kek in (KEK, OTHER, KEK)], [0] * 3)
            server.stop()
        self.assertEqual([(line['method'], line['count']) for line in self.used(server)], [('Decrypt', '1'), ('Decrypt', '3')])
        self.assertEqual(self.used(server)[0]['key_id'], key_id(KEK))
        self.assertNotIn(self.used(server)[1]['key_id'], (key_id(KEK), key_id(OTHER)), 'it was not one KEK alone')

    def test_a_flood_does_not_fill_the_log(self):
        """What is left out is counted, and told at the end at the latest."""
        server = self.start()
        for _ in range(300):
            with Raw(server.path) as raw:
                self.assertEqual(raw.call(ENCRYPT, message(field(1, b'x'))).status, 0)
        self.assertEqual(calls(scrape(server.path), 'v2', 'Encrypt', 'OK'), 300)
        server.stop()
        told, left_out = len(self.used(server)), [int(line['count']) for line in events(server, 'lines left out')]
        self.assertTrue(100 <= told <= 240, told)       # 120 a minute, of which two may have begun
        self.assertEqual(told + sum(left_out), 600)
