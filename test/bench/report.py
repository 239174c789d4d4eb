"""What run.py measured, as a table (bench.md) and as a plot (bench.svg)."""
import os
import statistics
from html import escape

PLUGIN, GO, RUST, FLOOR = 'plugin', 'go', 'rust', 'floor'
NAMES = {PLUGIN: 'kmsplugin', GO: 'Go plugin', RUST: 'Rust plugin', FLOOR: 'floor'}

# Measurement, what a reader calls it, its unit.
ROWS = [
    ('latency', 'Encrypt, one at a time, client on the same core: p50', 'µs'),
    ('go-p50', 'the same with grpc-go on another core: p50', 'µs'),
    ('go-p99', 'the same: p99', 'µs'),
    ('cpu-Encrypt', 'server CPU per Encrypt, 8 connections x 32 streams', 'µs'),
    ('cpu-Decrypt', 'server CPU per Decrypt', 'µs'),
    ('cpu-Status', 'server CPU per Status', 'µs'),
    ('rate-Encrypt', 'Encrypts a second', '/s'),
    ('busy-Encrypt', "the server's core busy with it (far from 100: client or machine are the limit)", '%'),
    ('instructions', 'instructions per Encrypt in user space', ''),
    ('bytes', 'bytes of the program', 'KiB'),
    ('ready', 'resident memory when ready', 'KiB'),
    ('used', 'the same after calls', 'KiB'),
    ('peak', 'the same at the peak: 8 connections of 100 calls', 'KiB'),
    ('idle', 'memory of an idle connection', 'KiB'),
    ('start', 'from spawn to the first answer', 'µs'),
    ('start-least', 'the same at best', 'µs'),
    ('unseal', '`unseal` of 10,000 etcd values, a process each', 's'),
    ('audit', '`audit` of 10,000 etcd values', 's'),
]


def ratio(m, row, a, b):
    return m[row, a] / m[row, b] if (row, a) in m and m.get((row, b)) else None


def targets(m, shapes):
    """(what, is, should be, met). No figure, no verdict: what was not measured is neither met nor missed."""
    spread = [m[('instructions', *shape), PLUGIN] for shape in shapes]
    limits = [
        ('Encrypt p50, of ping-pong', ratio(m, 'latency', PLUGIN, FLOOR), 'most', 1.7, 'x'),
        ('server CPU per Encrypt: the Go plugin takes', ratio(m, 'cpu-Encrypt', GO, PLUGIN), 'least', 5.5, 'x'),
        ('the Rust plugin takes', ratio(m, 'cpu-Encrypt', RUST, PLUGIN), 'least', 2.2, 'x'),
        ('instructions per Encrypt', m['instructions', PLUGIN], 'most', 20000, ''),
        ('instructions, over all shapes of load: most to least', max(spread) / min(spread), 'most', 1.2, 'x'),
        ('bytes of the program', m['bytes', PLUGIN], 'most', 256, 'KiB'),
        ('from spawn to the first answer, at best', m['start-least', PLUGIN], 'most', 1000, 'µs'),
        ('resident memory at the peak', m['peak', PLUGIN], 'most', 1536, 'KiB'),
        ('memory of an idle connection', m['idle', PLUGIN], 'most', 32, 'KiB'),
    ]
    for what, value, word, limit, unit in limits:
        met = '-' if value is None else 'yes' if (value <= limit if word == 'most' else value >= limit) else 'no'
        yield (what, 'not measured' if value is None else f'{value:,.2f} {unit}'.rstrip(),
               f'at {word} {limit:,} {unit}'.rstrip(), met)


# ---------------------------------------------------------------- Table

def number(value):
    if value is None:
        return ''
    return f'{value:,.0f}' if value >= 1000 else f'{value:.3g}' if value < 100 else f'{value:.0f}'


def table(head, rows):
    """A Markdown table whose columns also line up as they are."""
    rows = [head, *rows]
    width = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ['| ' + ' | '.join(f'{cell:{"<" if i == 0 else ">"}{width[i]}}' for i, cell in enumerate(row)) + ' |'
             for row in rows]
    lines.insert(1, '|' + '|'.join('-' * (w + 1) + ('-' if i == 0 else ':') for i, w in enumerate(width)) + '|')
    return '\n'.join(lines) + '\n'


def markdown(samples, m, machine, rounds, shapes):
    main = []
    for row, name, unit in ROWS:
        def times(a, b):
            """How often b is in a; of rates, of which more is better, the other way round."""
            value = ratio(m, row, b, a) if unit == '/s' else ratio(m, row, a, b)
            return f'{value:.2f} x' if value and unit != '%' else ''
        own = samples[row, PLUGIN]
        main.append([name + (f', {unit}' if unit not in ('', '/s') else ''),
                     *(number(m.get((row, subject))) for subject in (FLOOR, PLUGIN, GO, RUST)),
                     f'{number(min(own))} - {number(max(own))}' if len(own) > 1 else '',
                     times(PLUGIN, FLOOR), times(GO, PLUGIN), times(RUST, PLUGIN)])
    grown = [[f'{c} x {s}', number(m[('instructions', c, s), PLUGIN])] for c, s in shapes]
    return '\n'.join([
        '# How fast it is\n',
        f'`make bench` measured this, `make bench-doc` put it here: medians of {rounds} rounds, in which all programs',
        'take turns on one machine.\n',
        *(f'- {line}' for line in machine), '',
        'The floor is a ping-pong of 150 bytes between two processes (latency) or true(1) (`unseal`). The Go plugin is',
        "Kubernetes' own service library with AES-256-GCM, the Rust plugin tonic with ring on tokio's current-thread",
        'runtime; kmsplugin is linked statically, so is the Go plugin, and the Rust plugin needs glibc, which is not in',
        'its bytes. The load is test/bench/load.c, which sends 32 requests in one write, or one at a time.\n',
        '![plot](bench.svg)\n',
        table(['', 'floor', 'kmsplugin', 'Go plugin', 'Rust plugin', 'kmsplugin: least - most', 'of the floor',
               'ahead of Go', 'ahead of Rust'], main),
        '## Growth\n',
        table(['connections x streams', 'instructions per Encrypt'], grown),
        '## Targets\n',
        table(['', 'is', 'should be', 'met'], list(targets(m, shapes)))])


# ---------------------------------------------------------------- Plot

INK, SOFT = '#1f2328', '#59636e'
COLORS = {PLUGIN: '#0b62c4', GO: '#c2571a', RUST: '#7a4fb5', FLOOR: '#8a939c'}
WIDTH, HEIGHT, PANEL, LEFT, RIGHT = 890, 352, 400, 30, 460


def text(x, y, words, size=12, color=INK, anchor='start', weight='normal'):
    return (f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{color}" text-anchor="{anchor}" '
            f'font-weight="{weight}">{escape(words)}</text>')


def bars(x, y, title, m, row, unit):
    """One bar a subject, from zero, each with its value."""
    shown = [s for s in (FLOOR, PLUGIN, GO, RUST) if (row, s) in m]
    top = max(m[row, s] for s in shown)
    out = [text(x, y, title, 13, weight='bold')]
    for i, subject in enumerate(shown):
        at, width = y + 14 + 26 * i, max(2, m[row, subject] / top * (PANEL - 170))
        out += [text(x + 72, at + 14, NAMES[subject], 12, SOFT, 'end'),
                f'<rect x="{x + 80}" y="{at}" width="{width:.1f}" height="19" rx="2" fill="{COLORS[subject]}"/>',
                text(x + 86 + width, at + 14, f'{number(m[row, subject])} {unit}'.strip())]
    return out


def svg(m, machine):
    out = [text(LEFT, 30, 'kmsplugin, a Go and a Rust plugin, and the least there can be', 16, weight='bold'),
           *bars(LEFT, 66, 'Encrypt, one at a time, same core: p50', m, 'latency', 'µs'),
           *bars(RIGHT, 66, 'Server CPU per Encrypt (8 x 32)', m, 'cpu-Encrypt', 'µs'),
           *bars(LEFT, 206, 'Encrypts a second on one core (8 x 32)', m, 'rate-Encrypt', ''),
           *bars(RIGHT, 206, 'Memory of an idle connection', m, 'idle', 'KiB'),
           text(LEFT, HEIGHT - 14, machine[0], 11, SOFT)]
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
            'font-family="system-ui, sans-serif">\n<rect width="100%" height="100%" fill="#ffffff"/>\n' +
            '\n'.join(out) + '\n</svg>\n')


def write(folder, samples, machine, rounds, shapes):
    """Writes both files into the folder and gives the table."""
    m = {key: statistics.median(values) for key, values in samples.items() if values}
    words = markdown(samples, m, machine, rounds, shapes)
    for name, content in (('bench.md', words), ('bench.svg', svg(m, machine))):
        with open(os.path.join(folder, name), 'w', encoding='utf-8') as file:
            file.write(content)
    return words
