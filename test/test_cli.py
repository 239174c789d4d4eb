"""The command line: help, version, bad usage, endpoints, and the verb probe."""
import os
import re
import shutil
import socket
import subprocess
import threading
import time
import unittest
from concurrent.futures import ThreadPoolExecutor

import grpc

from plugin import (BINARY, KEK, OTHER, ROOT, STRANGER, WAIT, Case, as_user, fresh_dir, fresh_name, key_id, kms,
                    needs_root, public_binary, run)
import sealed
from raw import block, headers, settings
from sealed import V1, V2

VERBS = ('serve', 'probe', 'genkey', 'keyid', 'unseal', 'audit')
OPTIONS = ('--listen', '--mode', '--group', '--allow-uid', '--max-connections', '--sandbox',
           '--log-level', '--timeout', '--expect-key-id', '--strict', '--list', '--version',
           '--help')


class Usage(Case):
    def test_help(self):
        help_ = run('--help')
        self.assertEqual((help_.returncode, help_.stderr), (0, ''))
        for word in (*VERBS, *OPTIONS, 'KMS_KEK', 'KMS_KEK_FILE', 'unix:///run/kmsplugin/kms.sock'):
            self.assertIn(word.encode(), help_.stdout)
        self.assertLess(max(map(len, help_.stdout.splitlines())), 101)
        self.assertEqual(run('-h').stdout, help_.stdout)

    def test_help_of_every_verb(self):
        for verb in VERBS:
            self.assertEqual((run(verb, '-h').stdout, run(verb, '--help').stdout), (run('--help').stdout,) * 2)

    def test_version(self):
        done = run('--version')
        self.assertEqual((done.returncode, done.stderr), (0, ''))
        self.assertRegex(done.stdout, rb'\Akmsplugin \d+\.\d+\.\d+\S*\b')
        for library in (rb'nghttp2\D{1,3}\d+\.\d+', rb'protobuf-c\D{1,3}\d+\.\d+', rb'BearSSL'):
            self.assertRegex(done.stdout, rb'(?i)' + library)
        self.assertEqual(self.client(self.start()).version().runtime_version, done.stdout.split()[1].decode())

    def test_bad_usage(self):
        wrong = {'--mode': ('8', '0888', 'rw', '', '77777', '-1', '01000'), '--log-level': ('loud', 'warn', ''), '--sandbox': ('maybe', ''),
                 '--max-connections': ('0', '-1', 'many', '1x', '99999999999999999999', '', ' 1', '+1'),
                 '--allow-uid': ('', '0,,1', ',', '0,')}
        usages = [('serve', option, value) for option, values in wrong.items() for value in values]
        usages += [('probe', '--timeout', value) for value in ('0', '-1', 'soon', '', '0.5', '3s', '1e3', '99999999999')]
        usages += [('nonsense',), ('Serve',), ('',), ('--nonsense',), ('-x',), ('serve', '--nonsense'), ('serve', 'extra'),
                   ('serve', '--listen'), ('serve', '--mode'), ('serve', '--timeout', '3'), ('probe', '--timeout'),
                   ('probe', 'unix:///a/b', 'unix:///c/d'), ('probe', '--listen', 'x'), ('genkey', 'extra'), ('keyid', 'extra'),
                   ('unseal', 'a', 'b'), ('unseal', '--all', 'a'), ('genkey', '--nonsense'), ('audit', 'extra'), ('audit', '--strict=x')]
        for args in usages:
            with self.subTest(args=args):
                line = self.dies(*args, code=2, kek=KEK)
                if len(args) == 3 and args[1] in wrong:
                    self.assertIn(args[1], line)

    def test_no_option_is_shortened(self):
        """What a script writes today is not another option's prefix tomorrow."""
        for args in (('serve', '--mod', '0600'), ('serve', '--listen' + 'x' * 40, 'unix:///a'), ('probe', '--time=3'),
                     ('serve', '--listen' + 'x' * 40 + '=unix:///a')):
            self.dies(*args, code=2, kek=KEK)

    def test_unknown_users_and_groups(self):
        for option in ('--group', '--allow-uid'):
            for name in ('no-such-name', '-1', '4294967295', '4294967296', '0x0'):
                with self.subTest(option=option, name=name):
                    line = self.dies('serve', '--listen', f'unix://{fresh_dir()}/kms.sock', option, name, code=(1, 2), kek=KEK)
                    self.assertIn(name, line)
                    self.assertIn('number', line)

    def test_serve_is_the_default(self):
        """Without a verb an option of serve is understood, in both forms, and a missing key told."""
        listen = f'unix://{fresh_dir()}/kms.sock'
        said = self.dies('serve', '--listen', listen)
        self.assertEqual((self.dies('--listen', listen), self.dies(f'--listen={listen}')), (said, said))

    def test_control_characters_are_not_echoed(self):
        """An argument that is printed back cannot rewrite the terminal or forge a line."""
        done = run('non\x1b[31m\nsense')
        self.assertEqual(done.returncode, 2)
        self.assertNotIn('\x1b', done.stderr)


def text_of(name):
    with open(os.path.join(ROOT, name), encoding='utf-8') as file:
        return file.read()


class Documents(Case):
    """README and man page say what --help says."""

    def options(self):
        """By verb: what --help has of each verb's options. '' is for those of all verbs."""
        found, verb = {}, None
        for line in run('--help').stdout.decode().splitlines():
            if heading := re.match(r'Options of (\w+):$', line):
                verb = heading[1]
            elif not line:
                verb = ''
            if verb is not None and (option := re.match(r'  +(?:-h, )?(--[a-z-]+)', line)):
                found.setdefault(verb, []).append(option[1])
        self.assertEqual(sorted(sum(found.values(), [])), sorted(OPTIONS))
        return found

    def test_readme(self):
        block = re.search(r'^Options:\n\n((?: {4}.*\n|\n)+)', text_of('README'), re.M)[1]
        block = re.sub('^    ', '', block, flags=re.M)
        self.assertEqual(block.strip().splitlines(), run('--help').stdout.decode().strip().splitlines())

    def test_man_page(self):
        options, page = self.options(), text_of('doc/kmsplugin.8')
        synopsis, body = page.split('.Sh SYNOPSIS\n')[1].split('.Sh DESCRIPTION\n')
        self.assertEqual(tuple(re.findall(r'^\.It Cm (\w+)$', body, re.M)), VERBS)
        for verb, names in options.items():
            heading = f'Options of {verb}' if verb else 'General options'
            section = re.split(r'^\.S[sh] ', body.split(f'.Ss {heading}\n')[1], maxsplit=1, flags=re.M)[0]
            described = ['-' + name for name in re.findall(r'^\.It Fl .*?(-[a-z]\S+)', section, re.M)]
            self.assertEqual(sorted(described), sorted(names), heading)
        self.assertEqual(body.count('.It Fl '), len(OPTIONS), 'options under a heading of another kind')
        usages = {}
        for usage in synopsis.split('.Nm\n')[1:]:
            verb = re.search(r'Cm (\w+)', usage)
            usages[verb[1] if verb else ''] = sorted('-' + o for o in re.findall(r' (-[a-z][a-z-]+)', usage))
        self.assertEqual(usages, {verb: sorted(options.get(verb, [])) for verb in ('', *VERBS)})

    def test_man_page_names_the_environment(self):
        page = text_of('doc/kmsplugin.8')
        for name in re.findall(r'^  ([A-Z_]{5,}) ', run('--help').stdout.decode(), re.M):
            self.assertRegex(page, rf'(?m)^\.It Ev {name}$')

    def test_security_names_what_there_is(self):
        """Each function and constant in its table is in kmsplugin.c, each test is one."""
        program, rows = text_of('kmsplugin.c'), re.findall(r'^\| (.+?) \| (.+?) \| (.+?) \|$', text_of('doc/security.md'), re.M)
        table = rows[:1 + next(i for i, row in enumerate(rows) if row[0] == 'given up')]
        names = [(row, name) for row in table for name in re.findall('`([^`]+)`', row[1])]
        self.assertGreater(len(names), 50)
        for row, name in names:
            with self.subTest(threat=row[0], by=name):
                self.assertTrue(name.startswith('\\') or os.path.exists(os.path.join(ROOT, name)) or
                                re.search(rf'(?m)^[a-z].*\b{name}\(.*{{$|^    {name} = ', program) or
                                re.search(rf'(?ms)^static [^;{{}}]*\b{name}\([^;{{}}]*{{$', program))
        shown = [(row, name) for row in table for name in re.findall('`([^`]+)`', row[2])]
        self.assertGreater(len(shown), 50)
        for row, name in shown:
            with self.subTest(threat=row[0], shown=name):
                kind, _, test = name.partition(' ')
                if kind == 'unit':
                    self.assertIn(f'\nTEST({test}) {{', text_of('test/unit.c'))
                elif kind == 'hostile':
                    self.assertRegex(text_of('test/hostile.py'), rf'(?m)^def {test}\(')
                elif kind == 'make':
                    self.assertRegex(text_of('test/test.mk'), rf'(?m)^{test}:')
                elif kind == 'fuzz' or '/' in name:
                    self.assertTrue(os.path.exists(os.path.join(ROOT, name if '/' in name else f'test/fuzz/{test}.c')))
                else:
                    file, *inner = name.split('.')
                    for word in inner:
                        self.assertRegex(text_of(f'test/{file}.py'), rf'(?m)^ *(class|def) {word}\(')

    def test_contributing_names_every_suite(self):
        targets = re.findall(r"^\t@echo 'make ([a-z-]+)", text_of('test/test.mk'), re.M)
        self.assertIn('test', targets)
        for target in targets:
            self.assertTrue(f'`make {target}`' in text_of('doc/contributing.md'), target)

    @unittest.skipUnless(shutil.which('mandoc'), 'needs mandoc')
    def test_man_page_is_clean(self):
        done = subprocess.run(['mandoc', '-T', 'lint', os.path.join(ROOT, 'doc/kmsplugin.8')],
                              capture_output=True, text=True, check=False)
        # whether the pages that it refers to are installed here is not its fault
        self.assertEqual([line for line in (done.stdout + done.stderr).splitlines()
                          if 'referenced manual not found' not in line and 'mandoc.db' not in line], [])


class Endpoints(Case):
    def test_bad_endpoints(self):
        directory = fresh_dir()
        long_path = directory + '/' + 'p' * (108 - len(directory) - 1)
        self.assertEqual(len(long_path), 108)
        bad = {'unix://': ('', 'unix://run/kms.sock', 'unix://kms.sock', 'unix://@name', 'unix:', 'unix:/', 'unix://', 'unix:///',
                           'unix:///@', 'unix:///run/', f'unix:{directory}/kms.sock', f'unix:/{directory}/kms.sock', '@name',
                           f'{directory}/kms.sock', 'kms.sock', f'UNIX://{directory}/kms.sock', 'tcp://127.0.0.1:1234',
                           'http://localhost/', '127.0.0.1:1234'),
               '107': (f'unix://{long_path}', 'unix:///@' + 'n' * 108),
               '[%?#]': (f'unix://{directory}/a%2Fb', f'unix://{directory}/a?b', f'unix://{directory}/a#b', 'unix:///@a%b',
                         'unix:///@a?b', 'unix:///@a#b'),
               'No such file': (f'unix://{directory}/missing/kms.sock',)}
        for says, endpoints in bad.items():
            for endpoint in endpoints:
                with self.subTest(endpoint=endpoint):
                    line = self.dies('serve', '--listen', endpoint, code=(1, 2), kek=KEK).replace(endpoint, '', 1)
                    self.assertRegex(line, says)
                    self.assertGreater(len(line.split()), 3, line)
                    self.dies('probe', endpoint, code=(1, 2))
        self.assertEqual(os.listdir(directory), [])

    def test_longest_path(self):
        directory = fresh_dir()
        server = self.start(path=directory + '/' + 'p' * (107 - len(directory) - 1))
        self.assertEqual(run('probe', 'unix://' + server.path).returncode, 0)


class Plugin(grpc.GenericRpcHandler):
    """A plugin of other make, well or not: what probe is to tell apart."""

    def __init__(self, delay=0, **wrong):
        self.path, self.delay = fresh_dir() + '/kms.sock', delay
        self.words = {'version': 'v2', 'healthz': 'ok', 'status_key_id': key_id(KEK), 'key_id': key_id(KEK), 'version_v1': 'v1beta1',
                      'runtime': '0.0.1', **wrong}
        self.server = grpc.server(ThreadPoolExecutor(2))
        self.server.add_generic_rpc_handlers((self,))
        self.server.add_insecure_port('unix:' + self.path)
        self.server.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.stop(0).wait()

    def service(self, handler_call_details):
        api, method = re.fullmatch(r'/(\w+)\.KeyManagementService/(\w+)', handler_call_details.method).groups()
        messages = kms if api == 'v2' else kms.V1beta1

        def answer(asked, context):
            time.sleep(self.delay)
            if 'status' in self.words and method == 'Status':
                context.abort(grpc.StatusCode.INTERNAL, self.words['status'])
            asked = getattr(messages, method + 'Request').FromString(asked)
            return getattr(messages, method + 'Response')(**getattr(self, f'{method}_{api}')(asked, self.words)).SerializeToString()
        return grpc.unary_unary_rpc_method_handler(answer)

    def Status_v2(self, _, words):
        return {'version': words['version'], 'healthz': words['healthz'], 'key_id': words['status_key_id']}

    def Encrypt_v2(self, asked, words):
        return {'ciphertext': sealed.seal(KEK, asked.plaintext, V2), 'key_id': words['key_id']}

    def Decrypt_v2(self, asked, words):
        return {'plaintext': words.get('plaintext', sealed.unseal(KEK, asked.ciphertext, V2))}

    def Version_v1beta1(self, _, words):
        return {'version': words['version_v1'], 'runtime_name': 'python', 'runtime_version': words['runtime']}

    def Encrypt_v1beta1(self, asked, _):
        return {'cipher': sealed.seal(KEK, asked.plain, V1)}

    def Decrypt_v1beta1(self, asked, words):
        return {'plain': words.get('plain', sealed.unseal(KEK, asked.cipher, V1))}


class Probe(Case):
    def assert_well(self, endpoint, *args, **options):
        done = run('probe', endpoint, *args, **options)
        self.assertEqual((done.returncode, done.stderr), (0, ''))
        *steps, last = done.stdout.decode().splitlines()
        self.assertEqual(len(steps), 6)
        for line in steps:
            self.assertRegex(line, r'^v[12] \w+ ok \d+\.\d+ ms$')
        self.assertRegex(last, rf'^key_id {key_id(KEK)} version \d+\.\d+\.\d+$')
        for word in ('Status', 'Encrypt', 'Decrypt', 'Version', 'v2', 'v1'):
            self.assertIn(word, done.stdout.decode())

    def assert_unwell(self, *args):
        done = run('probe', *args)
        self.assertEqual(done.returncode, 1, done)
        self.assertEqual(len(done.stderr.splitlines()), 1, done.stderr)
        return done.stderr

    def test_file_and_abstract_sockets(self):
        name = fresh_name()
        server = self.start('--listen', f'unix:///@{name}')
        for endpoint in (f'unix://{server.path}', f'unix:///@{name}'):
            self.assert_well(endpoint, kek='not a key')

    @needs_root
    def test_another_user_is_refused(self):
        server = self.start('--mode', '0666')
        line = self.dies('probe', f'unix://{server.path}', binary=public_binary(), wrapper=as_user(STRANGER))
        self.assertRegex(line, rf'uid.*\b{STRANGER}\b')

    def test_no_server(self):
        path = fresh_dir() + '/kms.sock'
        self.assertIn(path, self.assert_unwell(f'unix://{path}'))
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(path)
        self.assertIn(path, self.assert_unwell(f'unix://{path}'))
        self.assert_unwell('unix:///@' + fresh_name())

    def test_timeout(self):
        """A server that accepts and is silent; one whose queue is full."""
        for backlog in (8, 0):
            path = fresh_dir() + '/kms.sock'
            with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
                listener.bind(path)
                listener.listen(backlog)
                first.connect(path)
                begin = time.monotonic()
                self.assertIn('in time', self.assert_unwell(f'unix://{path}', '--timeout', '1'))
                self.assertGreater(time.monotonic() - begin, 0.5)

    def answering(self, answer):
        """A listener that says the same to everybody and hangs up."""
        path = fresh_dir() + '/kms.sock'
        listener = socket.socket(socket.AF_UNIX)
        self.addCleanup(listener.close)
        listener.bind(path)
        listener.listen()
        listener.settimeout(WAIT)

        def serve():
            connection, _ = listener.accept()
            with connection:
                connection.sendall(answer)
                connection.shutdown(socket.SHUT_WR)
                connection.settimeout(WAIT)
                while connection.recv(4096):
                    pass
        thread = threading.Thread(target=serve)
        thread.start()
        self.addCleanup(thread.join)
        return f'unix://{path}'

    def test_not_a_plugin(self):
        for answer in (b'', b'HTTP/1.1 200 OK\r\n\r\n', bytes(100), os.urandom(1000),
                       b'\0\0\0\4\0\0\0\0\0', b'\0\0\0\4\0\0\0\0\0' + b'\0\0\x08\7' + bytes(13)):
            with self.subTest(answer=answer[:20]):
                self.assert_unwell(self.answering(answer))

    def assert_printable(self, endpoint, word):
        """Nothing that a terminal obeys comes out of a probe, and the word of the peer does."""
        done = subprocess.run([BINARY, 'probe', endpoint, '--timeout', '10'], capture_output=True, timeout=WAIT, check=False)
        self.assertRegex(done.stdout + done.stderr, rb'\A[ -~\n]+\Z')
        self.assertIn(word, done.stdout + done.stderr)
        return done.returncode

    def test_what_a_peer_says_is_escaped(self):
        """ESC, C1 controls as UTF-8, and the direction of writing, wherever a plugin has words of its own."""
        evil = 'a\x1b[31m\u009b31m\u202e\n'
        for wrong, status in (({'key_id': evil}, 1), ({'key_id': evil, 'status_key_id': evil}, 0), ({'version': evil}, 1),
                              ({'healthz': evil}, 1), ({'version_v1': evil}, 1), ({'runtime': evil}, 0), ({'status': evil}, 1)):
            with self.subTest(wrong=wrong):
                with Plugin(**wrong) as plugin:
                    self.assertEqual(self.assert_printable(f'unix://{plugin.path}', rb'31m'), status)

    def test_raw_bytes_of_a_peer_are_escaped(self):
        """Each byte that a header field may hold and each that it may not, as grpc-message."""
        for text in (b'\x9b31m', b'\xc2\x9b31m', b'\x1b[31m', b'%1B[31m', b'%9B31m', b'%C2%9B', bytes(range(128, 256)),
                     bytes(range(1, 32))):
            with self.subTest(text=text):
                head = headers(1, block([(b':status', b'200'), (b'content-type', b'application/grpc'), (b'grpc-status', b'13'),
                                         (b'grpc-message', text)]), end=True)
                self.assertEqual(self.assert_printable(self.answering(settings() + head), b'Status'), 1)

    def test_a_plugin_that_is_well(self):
        """A real gRPC server of other make understands the probe."""
        with Plugin() as plugin:
            self.assert_well(f'unix://{plugin.path}', '--timeout', '10', '--expect-key-id', key_id(KEK))

    def test_plugins_that_are_not_well(self):
        for wrong in ({'healthz': 'no'}, {'healthz': ''}, {'version': 'v3'}, {'status': 'error'},
                      {'key_id': key_id(KEK)[::-1]}, {'plaintext': b'other'}, {'plaintext': b''},
                      {'version_v1': 'v1'}, {'plain': b'other'}):
            with self.subTest(wrong=wrong):
                with Plugin(**wrong) as plugin:
                    self.assert_unwell(f'unix://{plugin.path}', '--timeout', '10')

    def test_another_key_id_than_expected(self):
        with Plugin() as plugin:
            for other in (key_id(OTHER), key_id(KEK).upper(), key_id(KEK)[:31], ''):
                self.assertIn(key_id(KEK), self.assert_unwell(f'unix://{plugin.path}', '--timeout', '10', '--expect-key-id', other))

    def test_the_timeout_is_for_all_of_it(self):
        """Each answer comes in time, and the last too late."""
        with Plugin(delay=0.4) as plugin:
            self.assertIn('in time', self.assert_unwell(f'unix://{plugin.path}', '--timeout', '1'))
