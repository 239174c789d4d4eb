"""What run.py measured, as a table (bench.md) and as a plot (bench.svg)."""
import os
import statistics
from html import escape

PLUGIN, PEER, FLOOR = 'plugin', 'peer', 'floor'
NAMES = {PLUGIN: 'kmsplugin', PEER: 'Go plugin', FLOOR: 'floor'}

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
    ('resident', 'resident memory after a load', 'MiB'),
    ('idle', 'memory of an idle connection', 'KiB'),
    ('unseal', '`unseal` of 10,000 etcd values, a process each', 's'),
    ('audit', '`audit` of 10,000 etcd values', 's'),
]


def ratio(m, row, a, b):
    return m[row, a] / m[row, b] if (row, a) in m and m.get((row, b)) else None


def targets(m, conns, streams):
    """(what, is, should be, met)"""
    def most(what, value, limit, unit):
        return what, f'{value:,.2f} {unit}', f'at most {limit:,} {unit}', value <= limit

    def least(what, value, limit, unit):
        return what, f'{value:,.2f} {unit}', f'at least {limit:,} {unit}', value >= limit

    def spread(shapes):
        values = [value for key, value in ((s, m.get((('instructions', *s), PLUGIN))) for s in shapes) if value]
        return max(values) / min(values)

    def grown(shapes):
        return m[('cpu', *shapes[-1]), PLUGIN] / m[('cpu', *shapes[0]), PLUGIN]
    return [
        most('Encrypt p50, of ping-pong', ratio(m, 'latency', PLUGIN, FLOOR), 1.35, 'x'),
        most('Encrypt p50, of the Go plugin', ratio(m, 'latency', PLUGIN, PEER), 0.5, 'x'),
        most('server CPU per Encrypt, h2load', m['cpu-Encrypt', PLUGIN], 1.2, 'µs'),
        least('the Go plugin takes', ratio(m, 'cpu-Encrypt', PEER, PLUGIN), 8, 'x'),
        most('server CPU per Encrypt, load.c', m['cpu-load', PLUGIN], 1.2, 'µs'),
        least('the Go plugin takes', ratio(m, 'cpu-load', PEER, PLUGIN), 8, 'x'),
        least('Encrypts a second, load.c', m['rate-load', PLUGIN], 800000, '/s'),
        least('those of the Go plugin', ratio(m, 'rate-load', PLUGIN, PEER), 8, 'x'),
        most('instructions per Encrypt', m['instructions', PLUGIN], 12000, ''),
        most('instructions from 1 to 64 connections: most to least', spread(conns), 1.2, 'x'),
        most('instructions from 1 to 250 streams: most to least', spread(streams), 1.2, 'x'),
        most('CPU per Encrypt, 64 connections to 1', grown(conns), 1, 'x'),
        most('CPU per Encrypt, 250 streams to 1', grown(streams), 1, 'x'),
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
        own = samples[row, PLUGIN]
        of_floor = ratio(m, row, PLUGIN, FLOOR)
        behind = ratio(m, row, PLUGIN, PEER) if unit == '/s' else ratio(m, row, PEER, PLUGIN)
        main.append([name + (f', {unit}' if unit not in ('', '/s') else ''),
                     *(number(m.get((row, subject))) for subject in (FLOOR, PLUGIN, PEER)),
                     f'{number(min(own))} - {number(max(own))}' if len(own) > 1 else '',
                     f'{of_floor:.2f} x' if of_floor and unit != '%' else '',
                     f'{behind:.1f} x' if behind and unit != '%' else ''])
    grown = [[f'{c} x {s}', number(m.get((('instructions', c, s), PLUGIN))),
              *(f'{m[("cpu", c, s), subject]:.2f}' for subject in (PLUGIN, PEER))]
             for c, s in dict.fromkeys(conns + streams)]
    goals = [[*cells, 'yes' if met else 'no'] for *cells, met in targets(m, conns, streams)]
    return '\n'.join([
        '# How fast it is\n',
        f'`make bench` measured this, `make bench-doc` put it here: medians of {rounds} rounds, in which all programs',
        'take turns on one machine.\n',
        *(f'- {line}' for line in machine), '',
        'The floor is a ping-pong of 150 bytes between two processes (first line), an HTTP/2 server that gives one',
        'answer to everything it is sent (latency, CPU, requests a second), or true(1) (`unseal`). The Go plugin is',
        "Kubernetes' own service library with AES-256-GCM. h2load needs more CPU for a request than kmsplugin does, so",
        'under it the server often waits, and wakes up for a few requests only; load.c sends 32 in one write.\n',
        '![plot](bench.svg)\n',
        table(['', 'floor', 'kmsplugin', 'Go plugin', 'kmsplugin: least - most', 'of the floor', 'ahead of Go'], main),
        '## Growth\n',
        'One Encrypt with h2load, by connections x streams:\n',
        table(['load', 'instructions', 'CPU, µs', 'Go plugin: CPU, µs'], grown),
        '## Targets\n',
        table(['', 'is', 'should be', 'met'], goals)])


# ---------------------------------------------------------------- Plot

INK, SOFT, GRID = '#1f2328', '#59636e', '#d8dee4'
COLORS = {PLUGIN: '#0b62c4', PEER: '#c2571a', FLOOR: '#8a939c'}
WIDTH, HEIGHT, PANEL, LEFT, RIGHT = 890, 520, 400, 30, 460


def text(x, y, words, size=12, color=INK, anchor='start', weight='normal'):
    return (f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{color}" text-anchor="{anchor}" '
            f'font-weight="{weight}">{escape(words)}</text>')


def bars(x, y, title, m, row, unit):
    """One bar a subject, from zero, each with its value."""
    shown = [s for s in (FLOOR, PLUGIN, PEER) if (row, s) in m]
    top = max(m[row, s] for s in shown)
    out = [text(x, y, title, 13, weight='bold')]
    for i, subject in enumerate(shown):
        at, width = y + 14 + 26 * i, max(2, m[row, subject] / top * (PANEL - 170))
        out += [text(x + 68, at + 14, NAMES[subject], 12, SOFT, 'end'),
                f'<rect x="{x + 76}" y="{at}" width="{width:.1f}" height="19" rx="2" fill="{COLORS[subject]}"/>',
                text(x + 82 + width, at + 14, f'{number(m[row, subject])} {unit}'.strip())]
    return out


def lines(x, y, title, m, shapes, ticks):
    """CPU per Encrypt: a curve a subject, with the first and the last value written out."""
    width, height = PANEL - 130, 120
    series = {subject: [m[('cpu', *shape), subject] for shape in shapes] for subject in (PLUGIN, PEER)}
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
        out += [text(points[i][0], points[i][1] - 8, number(values[i]), 11, color, 'middle') for i in (0, -1)]
        out.append(text(points[-1][0] + 20, points[-1][1] + 4, NAMES[subject], 11, color))
    return out


def svg(m, machine, conns, streams):
    out = [text(LEFT, 30, 'kmsplugin, a Go plugin, and the least there can be', 16, weight='bold'),
           *bars(LEFT, 66, 'Encrypt, one at a time, same core: p50', m, 'latency', 'µs'),
           *bars(RIGHT, 66, 'Server CPU per Encrypt (h2load, 8 x 32)', m, 'cpu-Encrypt', 'µs'),
           *bars(LEFT, 190, 'Encrypts a second on one core (load.c, 8 x 32)', m, 'rate-load', ''),
           *bars(RIGHT, 190, 'Memory of an idle connection', m, 'idle', 'KiB'),
           *lines(LEFT, 316, 'CPU per Encrypt, µs, by connections of 32 streams', m, conns, [c for c, _ in conns]),
           *lines(RIGHT, 316, 'CPU per Encrypt, µs, by streams on 8 connections', m, streams, [s for _, s in streams]),
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
