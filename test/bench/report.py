"""What run.py measured, as a table (bench.md) and as a plot (bench.svg)."""
import os
import statistics
from html import escape

PLUGIN, GO, RUST, FLOOR = 'plugin', 'go', 'rust', 'floor'
NAMES = {PLUGIN: 'kmsplugin', GO: 'Go plugin', RUST: 'Rust plugin', FLOOR: 'floor'}

# Measurement, what a reader calls it, its unit.
ROWS = [
    ('latency', 'Encrypt, one at a time, client on the same core: p50', 'µs'),
    ('latency-http2', 'the same, the floor being the HTTP/2 server', 'µs'),
    ('latency-h2load', 'the same with h2load', 'µs'),
    ('go-p50', 'the same with grpc-go on another core: p50', 'µs'),
    ('go-p99', 'the same: p99', 'µs'),
    ('cpu-Encrypt', 'server CPU per Encrypt, h2load, 8 connections x 32 streams', 'µs'),
    ('cpu-load', 'the same with load.c', 'µs'),
    ('cpu-Decrypt', 'server CPU per Decrypt, h2load', 'µs'),
    ('cpu-Status', 'server CPU per Status', 'µs'),
    ('cpu-Encrypt-v1', 'server CPU per v1 Encrypt', 'µs'),
    ('cpu-Decrypt-v1', 'server CPU per v1 Decrypt', 'µs'),
    ('rate-Encrypt', 'Encrypts a second, h2load, 8 x 32', '/s'),
    ('rate-load', 'the same with load.c', '/s'),
    ('busy', "the server's core busy with it (far from 100: client or machine are the limit)", '%'),
    ('instructions', 'instructions per Encrypt in user space, 8 x 32', ''),
    ('bytes', 'bytes of the program', 'KiB'),
    ('ready', 'resident memory when ready', 'KiB'),
    ('used', 'the same after calls', 'KiB'),
    ('peak', 'the same at the peak: 8 connections of 100 calls, all open', 'KiB'),
    ('start', 'from spawn to the first answer', 'µs'),
    ('idle', 'memory of an idle connection', 'KiB'),
    ('unseal', '`unseal` of 10,000 etcd values, a process each', 's'),
    ('audit', '`audit` of 10,000 etcd values', 's'),
]


def ratio(m, row, a, b):
    return m[row, a] / m[row, b] if (row, a) in m and m.get((row, b)) else None


def targets(m, conns, streams):
    """(what, is, should be, met)"""
    def judged(what, value, word, limit, unit):
        """No figure, no verdict: what was not measured is neither met nor missed."""
        if value is None:
            return what, 'not measured', f'at {word} {limit:,} {unit}'.rstrip(), '-'
        met = value <= limit if word == 'most' else value >= limit
        return what, f'{value:,.2f} {unit}'.rstrip(), f'at {word} {limit:,} {unit}'.rstrip(), 'yes' if met else 'no'

    def most(what, value, limit, unit=''):
        return judged(what, value, 'most', limit, unit)

    def least(what, value, limit):
        return judged(what, value, 'least', limit, 'x')

    def spread(shapes):
        values = [value for key, value in ((s, m.get((('instructions', *s), PLUGIN))) for s in shapes) if value]
        return max(values) / min(values)

    def grown(shapes):
        return m[('cpu', *shapes[-1]), PLUGIN] / m[('cpu', *shapes[0]), PLUGIN]
    return [
        most('Encrypt p50, of ping-pong', ratio(m, 'latency', PLUGIN, FLOOR), 1.4, 'x'),
        most('Encrypt p50, of the Go plugin', ratio(m, 'latency', PLUGIN, GO), 0.5, 'x'),
        least('server CPU per Encrypt, h2load: the Go plugin takes', ratio(m, 'cpu-Encrypt', GO, PLUGIN), 8),
        least('the Rust plugin takes', ratio(m, 'cpu-Encrypt', RUST, PLUGIN), 2.5),
        least('server CPU per Encrypt, load.c: the Go plugin takes', ratio(m, 'cpu-load', GO, PLUGIN), 8),
        least('the Rust plugin takes', ratio(m, 'cpu-load', RUST, PLUGIN), 2.5),
        least('Encrypts a second, load.c: of those of the Go plugin', ratio(m, 'rate-load', PLUGIN, GO), 8),
        most('instructions per Encrypt', m['instructions', PLUGIN], 16500),
        most('instructions from 1 to 64 connections: most to least', spread(conns), 1.2, 'x'),
        most('instructions from 1 to 250 streams: most to least', spread(streams), 1.2, 'x'),
        most('CPU per Encrypt, 64 connections to 1', grown(conns), 1, 'x'),
        most('CPU per Encrypt, 250 streams to 1', grown(streams), 1, 'x'),
        most('bytes of the program', m['bytes', PLUGIN], 256, 'KiB'),
        most('resident memory when ready', m['ready', PLUGIN], 256, 'KiB'),
        most('the same after calls', m['used', PLUGIN], 288, 'KiB'),
        most('the same at the peak', m['peak', PLUGIN], 1536, 'KiB'),
        most('memory of an idle connection', m['idle', PLUGIN], 32, 'KiB'),
    ]


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


def markdown(samples, m, machine, rounds, conns, streams):
    main = []
    for row, name, unit in ROWS:
        def times(a, b):
            """How often b is in a; of rates, of which more is better, the other way round."""
            value = ratio(m, row, b, a) if unit == '/s' and FLOOR not in (a, b) else ratio(m, row, a, b)
            return f'{value:.2f} x' if value and unit != '%' else ''
        own = samples[row, PLUGIN]
        main.append([name + (f', {unit}' if unit not in ('', '/s') else ''),
                     *(number(m.get((row, subject))) for subject in (FLOOR, PLUGIN, GO, RUST)),
                     f'{number(min(own))} - {number(max(own))}' if len(own) > 1 else '',
                     times(PLUGIN, FLOOR), times(GO, PLUGIN), times(RUST, PLUGIN)])
    grown = [[f'{c} x {s}', number(m.get((('instructions', c, s), PLUGIN))),
              *(number(m.get((('cpu', c, s), subject))) for subject in (PLUGIN, GO, RUST))]
             for c, s in dict.fromkeys(conns + streams)]
    return '\n'.join([
        '# How fast it is\n',
        f'`make bench` measured this, `make bench-doc` put it here: medians of {rounds} rounds, in which all programs',
        'take turns on one machine.\n',
        *(f'- {line}' for line in machine), '',
        'The floor is a ping-pong of 150 bytes between two processes (first line), an HTTP/2 server that gives one',
        'answer to everything it is sent (latency, CPU, requests a second), or a program that does nothing (start: an',
        "empty static one; `unseal`: true(1)). The Go plugin is Kubernetes' own service library with AES-256-GCM, the",
        "Rust plugin tonic with ring on tokio's current-thread runtime; kmsplugin is linked statically, so is the Go",
        'plugin, and the Rust plugin needs glibc, which is not in its bytes. h2load needs more CPU for a request than',
        'kmsplugin does, so under it the server often waits, and wakes up for a few requests only; load.c sends 32 in',
        'one write.\n',
        '![plot](bench.svg)\n',
        table(['', 'floor', 'kmsplugin', 'Go plugin', 'Rust plugin', 'kmsplugin: least - most', 'of the floor',
               'ahead of Go', 'ahead of Rust'], main),
        '## Growth\n',
        'One Encrypt with h2load, by connections x streams:\n',
        table(['load', 'instructions', 'CPU, µs', 'Go plugin: CPU, µs', 'Rust plugin: CPU, µs'], grown),
        '## Targets\n',
        table(['', 'is', 'should be', 'met'], targets(m, conns, streams))])


# ---------------------------------------------------------------- Plot

INK, SOFT, GRID = '#1f2328', '#59636e', '#d8dee4'
COLORS = {PLUGIN: '#0b62c4', GO: '#c2571a', RUST: '#7a4fb5', FLOOR: '#8a939c'}
WIDTH, HEIGHT, PANEL, LEFT, RIGHT = 890, 552, 400, 30, 460


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


def lines(x, y, title, m, shapes, ticks):
    """CPU per Encrypt: a curve a subject, with the first and the last value written out."""
    width, height = PANEL - 130, 120
    series = {subject: [m[('cpu', *shape), subject] for shape in shapes] for subject in (PLUGIN, GO, RUST)
              if (('cpu', *shapes[0]), subject) in m}
    top = max(max(values) for values in series.values()) * 1.15
    out = [text(x, y, title, 13, weight='bold')]
    base = y + 20 + height
    for share in (0, 0.5, 1):
        level = base - share * height
        out += [f'<line x1="{x + 40}" y1="{level}" x2="{x + 40 + width}" y2="{level}" stroke="{GRID}"/>',
                text(x + 34, level + 4, number(share * top) if share else '0', 11, SOFT, 'end')]
    place = [x + 62 + i * (width - 34) / (len(ticks) - 1) for i in range(len(ticks))]
    out += [text(px, base + 16, str(tick), 11, SOFT, 'middle') for px, tick in zip(place, ticks)]
    for subject, values in series.items():
        points = [(px, base - value / top * height) for px, value in zip(place, values)]
        path = ' '.join(f'{px:.1f},{py:.1f}' for px, py in points)
        color = COLORS[subject]
        out.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        out += [f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" fill="{color}"/>' for px, py in points]
        beside = 16 if subject == PLUGIN else -8      # below the lowest curve, above the others
        out += [text(points[i][0], points[i][1] + beside, number(values[i]), 11, color, 'middle') for i in (0, -1)]
        out.append(text(points[-1][0] + 20, points[-1][1] + 4, NAMES[subject], 11, color))
    return out


def svg(m, machine, conns, streams):
    out = [text(LEFT, 30, 'kmsplugin, a Go and a Rust plugin, and the least there can be', 16, weight='bold'),
           *bars(LEFT, 66, 'Encrypt, one at a time, same core: p50', m, 'latency', 'µs'),
           *bars(RIGHT, 66, 'Server CPU per Encrypt (h2load, 8 x 32)', m, 'cpu-Encrypt', 'µs'),
           *bars(LEFT, 206, 'Encrypts a second on one core (load.c, 8 x 32)', m, 'rate-load', ''),
           *bars(RIGHT, 206, 'Memory of an idle connection', m, 'idle', 'KiB'),
           *lines(LEFT, 348, 'CPU per Encrypt, µs, by connections of 32 streams', m, conns, [c for c, _ in conns]),
           *lines(RIGHT, 348, 'CPU per Encrypt, µs, by streams on 8 connections', m, streams, [s for _, s in streams]),
           text(LEFT, HEIGHT - 14, machine[0], 11, SOFT)]
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
            'font-family="system-ui, sans-serif">\n<rect width="100%" height="100%" fill="#ffffff"/>\n' +
            '\n'.join(out) + '\n</svg>\n')


def write(folder, samples, machine, rounds, conns, streams):
    """Writes both files into the folder and gives the table."""
    m = {key: statistics.median(values) for key, values in samples.items() if values}
    words = markdown(samples, m, machine, rounds, conns, streams)
    for name, content in (('bench.md', words), ('bench.svg', svg(m, machine, conns, streams))):
        with open(os.path.join(folder, name), 'w', encoding='utf-8') as file:
            file.write(content)
    return words
