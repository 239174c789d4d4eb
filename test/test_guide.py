"""The tables of doc/operate.md against the program: all metrics, all log events, and nothing else."""
import pathlib
import re

import grpc

from plugin import KEK, Case, key_id
from raw import Raw

HERE = pathlib.Path(__file__).parent
GUIDE = (HERE / '../doc/operate.md').read_text(encoding='utf-8')


def table(head):
    """The rows of the table under this first cell, a list of cells each."""
    lines = GUIDE.split(f'\n| {head} |', 1)[1].split('\n')[2:]
    rows = []
    for line in lines:
        if not line.startswith('|'):
            return rows
        rows.append([cell.strip() for cell in line.strip('|').split('|')])
    raise AssertionError(head)


def names(cell):
    return re.findall('`([^`]+)`', cell)


class Tables(Case):
    def test_metrics(self):
        server = self.start()
        with Raw(server.path) as raw:
            types = re.findall(r'^# TYPE (\S+) (\S+)$', raw.get('/metrics').data.decode(), re.M)
        self.assertGreater(len(types), 5)
        self.assertEqual(sorted((name, row[1]) for row in table('metric') for name in names(row[0])), sorted(types))

    def test_labels(self):
        """Those that the table names, each metric has."""
        server = self.start()
        with self.assertRaises(grpc.RpcError):
            self.client(server).decrypt(b'x', key_id(KEK))
        with Raw(server.path) as raw:
            text = raw.get('/metrics').data.decode()
        for row in table('metric'):
            sample = re.search(rf'^{names(row[0])[0]}(?:_bucket)?(?:{{(.*)}})? ', text, re.M)
            has = set(re.findall(r'(\w+)="', sample[1] or '')) - {'le'} if sample else None
            self.assertEqual(has, set(names(row[2])), row[0])

    def test_log(self):
        """Every event of the source is in the table, with its level, and the other way round."""
        source = (HERE / '../kmsplugin.c').read_text(encoding='utf-8')
        calls = re.findall(r'log_line\(LOG_([A-Z]+),((?:\s*"(?:[^"\\]|\\.)*")+)', source)
        self.assertEqual(len(calls), len(re.findall(r'[^c] log_line\(|^log_line\(', source)) - source.count('void log_line('))
        events = set()
        for level, literals in calls:
            line = ''.join(re.findall(r'"((?:[^"\\]|\\.)*)"', literals)).replace('\\"', '"')
            events.add((re.match(r'msg=(?:"([^"]*)"|(\w+))', line).expand(r'\1\2'), level.lower()))
        self.assertEqual(sorted((name, row[1]) for row in table('`msg=`') for name in names(row[0])), sorted(events))

    def test_links(self):
        """Each link within the guide, and to it from the other documents, has its heading."""
        headings = {re.sub(r'[^\w -]', '', h.lower()).replace(' ', '-') for h in re.findall(r'^##? (.*)$', GUIDE, re.M)}
        links = re.findall(r'\]\(#([^)]*)\)', GUIDE)
        for path in HERE.glob('../doc/*.md'):
            links += re.findall(r'operate\.md#([\w-]*)', path.read_text(encoding='utf-8'))
        self.assertGreater(len(links), 30)
        self.assertEqual([link for link in links if link not in headings], [])
