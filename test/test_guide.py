"""The man page's lists against the program: all metrics, all log events, and nothing else; the guide's links."""
import pathlib
import re

from plugin import KEK, Case, RpcError, key_id
from raw import Raw

HERE = pathlib.Path(__file__).parent
DOCUMENTS = {path.name: path.read_text(encoding='utf-8') for path in HERE.glob('../doc/*.md')}


def items(heading):
    """The list under a heading of the man page: name and kind, and the text of each."""
    page = (HERE / '../doc/kmsplugin.8').read_text(encoding='utf-8')
    section = re.split(r'^\.S[sh] ', page.split(f'.Ss {heading}\n')[1], maxsplit=1, flags=re.M)[0]
    parts = re.split(r'^\.It Sy (.*) Pq (\w+)\n', section, flags=re.M)[1:]
    return {(name.strip('"'), kind): text for name, kind, text in zip(*[iter(parts)] * 3)}


class Lists(Case):
    def metrics(self):
        server = self.start()
        with self.assertRaises(RpcError):
            self.client(server).decrypt(b'x', key_id(KEK))
        with Raw(server.path) as raw:
            return raw.get('/metrics').data.decode()

    def test_metrics(self):
        """Each has its type, and the labels that its text names."""
        metrics, listed = self.metrics(), items('Metrics')
        self.assertEqual(sorted(listed), sorted(re.findall(r'^# TYPE (\S+) (\S+)$', metrics, re.M)))
        self.assertGreater(len(listed), 5)
        for (name, _), text in listed.items():
            sample = re.search(rf'^{name}(?:_sum)?(?:{{(.*)}})? ', metrics, re.M)
            self.assertEqual(set(re.findall(r'(\w+)="', sample[1] or '')), set(re.findall(r'^\.Ql (\w+)', text, re.M)), name)

    def test_log(self):
        """Every event of the source is in the list, with its level, and the other way round."""
        source = (HERE / '../kmsplugin.c').read_text(encoding='utf-8')
        calls = re.findall(r'log_line\(LOG_([A-Z]+),((?:\s*"(?:[^"\\]|\\.)*")+)', source)
        self.assertEqual(len(calls), len(re.findall(r' log_line\(', source)) - source.count('void log_line('))
        uses = re.findall(r'conn_log_use\(c, rpc, "((?:[^"\\]|\\.)*)"\)', source)
        events = set()
        for level, literals in calls:
            line = ''.join(re.findall(r'"((?:[^"\\]|\\.)*)"', literals))
            for line in [line.replace('msg=%s', 'msg=' + use) for use in uses] if 'msg=%s' in line else [line]:
                events.add((re.match(r'msg=(?:"([^"]*)"|(\w+))', line.replace('\\"', '"')).expand(r'\1\2'), level.lower()))
        self.assertEqual(sorted(items('Log')), sorted(events))


class Links(Case):
    def test_links(self):
        """Each link within the documents has its file and its heading."""
        count = 0
        for name, text in DOCUMENTS.items():
            for file, heading in re.findall(r'\]\(([\w-]+\.md)?#([^)]*)\)', text):
                headings = {re.sub(r'[^\w -]', '', h.lower()).replace(' ', '-')
                            for h in re.findall(r'^#{1,3} (.*)$', DOCUMENTS[file or name], re.M)}
                self.assertIn(heading, headings, name)
                count += 1
        self.assertGreater(count, 20)
