"""deploy/metrics/kmsplugin-textfile: root, at work in a folder of another user."""
import os
import shutil
import signal
import subprocess
import sys
import unittest

from plugin import BINARY, KEK, ROOT, SANITIZED, STRANGER, TMP, WAIT, Case, as_user, fresh_dir, needs_root, text

# As it is installed: the program beside it.
SCRIPT = os.path.join(TMP, 'textfile', 'kmsplugin-textfile')
TRIES = 100

# The folder's owner: in each run of the script puts a link to argv[2] in the place of one file there, in every other run as
# soon as something is in it; and in the place of a folder named `swapped` a link to argv[3]. Told to stop, it prints how
# often it did.
ATTACKER = '''
import os, signal, sys
folder, target, elsewhere = sys.argv[1:]
stop, runs, done = [], set(), 0
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
os.chdir(folder)
os.symlink(elsewhere, 'other')
print('ready', flush=True)
while not stop:
    for name in os.listdir('.'):
        try:
            if name == 'swapped':
                os.rename(name, 'away')
                os.rename('other', name)
                os.rename(name, 'other')
                os.rename('away', name)
            elif name.startswith('.kmsplugin.') and name[:17] not in runs and (len(runs) % 2 == 0 or os.stat(name).st_size > 0):
                os.symlink(target, 'link')
                os.rename('link', name)
                runs.add(name[:17])
            else:
                continue
            done += 1
        except OSError:
            pass
print(done)
'''


def textfile(folder, socket, path=os.environ['PATH']):
    """A run of the script: exit status and stderr."""
    done = subprocess.run([SCRIPT, folder, socket], env={'PATH': path}, capture_output=True, timeout=WAIT, text=True, check=False)
    assert done.stdout == '', done.stdout
    return done.returncode, done.stderr


@needs_root
@unittest.skipIf(SANITIZED, 'the script is the same')
@unittest.skipUnless(shutil.which('curl'), 'needs curl')
class Textfile(Case):
    @classmethod
    def setUpClass(cls):
        os.makedirs(os.path.dirname(SCRIPT))
        shutil.copy(os.path.join(ROOT, 'deploy/metrics/kmsplugin-textfile'), SCRIPT)
        os.symlink(BINARY, os.path.join(os.path.dirname(SCRIPT), 'kmsplugin'))

    def setUp(self):
        self.server = self.start()
        self.folder = fresh_dir()
        self.prom = self.folder + '/kmsplugin.prom'

    def read(self):
        with open(self.prom, encoding='ascii') as file:
            return file.read()

    def attack(self, folder, *targets):
        """Runs the script beside the attacker, and tells how often that one got between."""
        attacker = subprocess.Popen([*as_user(STRANGER), sys.executable, '-c', ATTACKER, folder, *targets],
                                    stdout=subprocess.PIPE, text=True)
        try:
            self.assertEqual(attacker.stdout.readline(), 'ready\n')
            yield from range(TRIES)
            attacker.send_signal(signal.SIGTERM)
            count = int(attacker.communicate(timeout=WAIT)[0])
        finally:
            attacker.kill()
            attacker.wait()
            attacker.stdout.close()
        self.assertGreater(count, 0, 'the attacker came too late')

    def test_links_of_the_owner(self):
        """The owner of the folder renames links to the KEK over the files of a run."""
        os.chown(self.folder, STRANGER, STRANGER)
        kek, came_out, changed = fresh_dir() + '/kek', 0, 0
        for _ in self.attack(self.folder, kek, '/nowhere'):
            with open(kek, 'w', encoding='ascii') as file:
                file.write(text(KEK))
            os.chmod(kek, 0o600)
            textfile(self.folder, self.server.path)
            came_out += self.readable(text(KEK))
            state = os.stat(kek)
            changed += (state.st_mode & 0o777, state.st_uid, state.st_size) != (0o600, 0, 44)
        self.assertEqual((came_out, changed), (0, 0), f'of {TRIES} runs: the KEK came out, or it was changed')

    def readable(self, secret):
        """Whether a file in the folder, and no link, has it."""
        for name in os.listdir(self.folder):
            try:
                file = os.open(os.path.join(self.folder, name), os.O_RDONLY | os.O_NOFOLLOW)
            except OSError:         # a link, or gone
                continue
            with open(file, encoding='ascii') as opened:
                if secret in opened.read():
                    return True
        return False

    def test_the_folder_itself_is_swapped(self):
        """The owner of the parent puts a link to a folder of root's in the place of the folder."""
        os.chown(self.folder, STRANGER, STRANGER)
        os.mkdir(self.folder + '/swapped')
        mine = fresh_dir()
        for _ in self.attack(self.folder, '/nowhere', mine):
            textfile(self.folder + '/swapped', self.server.path)
        self.assertEqual(os.listdir(mine), [])

    def test_the_file_is_the_owners(self):
        for owner in (0, STRANGER):
            os.chown(self.folder, owner, owner)
            self.assertEqual(textfile(self.folder, self.server.path), (0, ''))
            self.assertEqual(os.listdir(self.folder), ['kmsplugin.prom'])
            state = os.stat(self.prom)
            self.assertEqual((state.st_uid, state.st_mode & 0o777), (owner, 0o644))
            self.assertRegex(self.read(), r'(?m)\A(#.*\n){2}kmsplugin_up 1\n(.*\n)+kmsplugin_process_start_time_seconds \d+$')
        self.assertNotRegex(self.read(), '(?m)^(# (HELP|TYPE) )?process_')

    def values(self):
        return [line for line in self.read().splitlines() if not line.startswith('#')]

    def test_a_plugin_that_is_down(self):
        status, said = textfile(self.folder, self.folder + '/none')
        self.assertEqual((status, self.values()), (0, ['kmsplugin_up 0']))
        self.assertIn('curl:', said)
        self.assertIn('No such file or directory', said)

    def test_a_curl_that_fails(self):
        """It is not the plugin that is down; what curl says is let through."""
        tools = fresh_dir()
        with open(tools + '/curl', 'w', encoding='ascii') as file:
            file.write('#!/bin/sh\necho "curl: (2) no HTTP/2 here" >&2\nexit 2\n')
        os.chmod(tools + '/curl', 0o755)
        status, said = textfile(self.folder, self.server.path, tools + ':' + os.environ['PATH'])
        self.assertEqual((status, self.values()), (1, ['kmsplugin_up 1']))
        self.assertIn('no HTTP/2 here', said)

    def test_what_it_refuses(self):
        """Nothing is written, and the file of before stays as it is."""
        link, tools = fresh_dir() + '/link', fresh_dir()
        os.symlink(self.folder, link)
        for tool in ('sh', 'stat', 'dirname', 'setpriv', 'setsid'):
            os.symlink(shutil.which(tool), f'{tools}/{tool}')
        for mode, folder, path, word in ((0o755, link, None, 'link'), (0o755, self.folder + '/missing', None, 'missing'),
                                         (0o755, os.path.relpath(self.folder), None, 'is not the path'), (0o755, self.folder, tools, 'curl: not found'),
                                         (0o775, self.folder, None, 'chown'), (0o1777, self.folder, None, 'chown')):
            with self.subTest(folder=folder, mode=mode):
                os.chmod(self.folder, mode)
                status, said = textfile(folder, self.server.path, path or os.environ['PATH'])
                self.assertEqual(status, 1)
                self.assertIn(word, said)
                self.assertEqual(os.listdir(self.folder), [])

    def test_a_folder_that_its_owner_cannot_write(self):
        os.chown(self.folder, STRANGER, STRANGER)
        os.chmod(self.folder, 0o555)
        status, said = textfile(self.folder, self.server.path)
        self.assertEqual((status, os.listdir(self.folder)), (1, []))
        self.assertRegex(said, f'uid {STRANGER} cannot write there: mktemp: .*Permission denied')
