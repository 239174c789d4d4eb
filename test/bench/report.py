"""What run.py measured, as a table (bench.md) and as a plot (bench.svg)."""
import os
from html import escape

PLUGIN, PEER, FLOOR = 'plugin', 'peer', 'floor'
NAMES = {PLUGIN: 'kmsplugin', PEER: 'Go plugin', FLOOR: 'floor'}

# Measurement, what a reader calls it, its unit.
ROWS = [
    ('latency', 'Encrypt, one at a time, client on the same core: p50', 'µs'),
    ('latency-http2', 'the same, the floor being the HTTP/2 server', 'µs'),
    ('latency-h2load', 'the same with h2load: mean', 'µs'),
    ('go-latency', 'the same with grpc-go on another core: p50', 'µs'),
    ('cpu-Encrypt', 'server CPU per Encrypt, 8 connections x 32 streams', 'µs'),
    ('cpu-Decrypt', 'server CPU per Decrypt', 'µs'),
    ('cpu-Status', 'server CPU per Status', 'µs'),
    ('cpu-Encrypt-v1', 'server CPU per v1 Encrypt', 'µs'),
    ('cpu-Decrypt-v1', 'server CPU per v1 Decrypt', 'µs'),
    ('rate-Encrypt', 'Encrypts a second, h2load, 8 x 32', '/s'),
    ('rate-load', 'the same with load.c, for which h2load is no limit', '/s'),
    ('rate-Decrypt', 'Decrypts a second', '/s'),
    ('rate-Status', 'Statuses a second', '/s'),
    ('rate-Encrypt-v1', 'v1 Encrypts a second', '/s'),
    ('rate-Decrypt-v1', 'v1 Decrypts a second', '/s'),
    ('go-rate', 'Encrypts a second, grpc-go, 8 x 32 (the client is the limit)', '/s'),
    ('instructions', 'instructions per Encrypt in user space, 8 x 32', ''),
    ('start', 'from exec to the first Status', 'ms'),
    ('resident', 'resident memory after start and load', 'MiB'),
    ('idle', 'memory of an idle connection', 'KiB'),
    ('unseal', '`unseal` of 10,000 etcd values, a process each', 's'),
    ('audit', '`audit` of 10,000 etcd values', 's'),
]


def ratio(m, row, a, b):
    if (row, a) not in m or not m.get((row, b)):
        return None
    return m[row, a] / m[row, b]


def spread(m, what, shapes):
    """The largest over the least, over some shapes of load."""
    values = [m[(what, *shape), PLUGIN] for shape in shapes]
    return max(values) / min(values)


def by_load(shapes, usual):
    """The shapes that differ from the usual one in connections alone, and in streams alone."""
    return [sorted(s for s in shapes if s[i] == usual[i]) for i in (1, 0)]


def targets(m, shapes, usual):
    """(what, is, should be, met)"""
    conns, streams = by_load(shapes, usual)

    def most(what, value, limit, unit=''):
        return what, f'{value:,.2f}{unit}', f'at most {limit:,}{unit}', value <= limit

    def least(what, value, limit, unit=''):
        return what, f'{value:,.2f}{unit}', f'at least {limit:,}{unit}', value >= limit

    def grown(few):
        return m[('cpu', *few[-1]), PLUGIN] / m[('cpu', *few[0]), PLUGIN]
    return [
        most('Encrypt p50, of ping-pong', ratio(m, 'latency', PLUGIN, FLOOR), 1.35, ' x'),
        most('Encrypt p50, of the Go plugin', ratio(m, 'latency', PLUGIN, PEER), 0.5, ' x'),
        most('server CPU per Encrypt', m['cpu-Encrypt', PLUGIN], 1.2, ' µs'),
        least('the Go plugin takes', ratio(m, 'cpu-Encrypt', PEER, PLUGIN), 8, ' x'),
        least('Encrypts a second', m['rate-Encrypt', PLUGIN], 800000),
        least('those of the Go plugin', ratio(m, 'rate-Encrypt', PLUGIN, PEER), 8, ' x'),
        most('instructions per Encrypt', m['instructions', PLUGIN], 12000),
        most('instructions, 1 to 64 connections: most to least', spread(m, 'instructions', conns), 1.2, ' x'),
        most('instructions, 1 to 250 streams: most to least', spread(m, 'instructions', streams), 1.2, ' x'),
        most('CPU per Encrypt, 64 connections to 1', grown(conns), 1, ' x'),
        most('CPU per Encrypt, 250 streams to 1', grown(streams), 1, ' x'),
        most('memory of an idle connection', m['idle', PLUGIN], 32, ' KiB'),
    ]


def number(value):
    if value is None:
        return ''
    return f'{value:,.0f}' if value >= 1000 else f'{value:.3g}' if value < 100 else f'{value:.0f}'


def table(head, rows, left=1):
    """A Markdown table whose columns also line up as they are."""
    rows = [head, *rows]
    width = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ['| ' + ' | '.join(f'{cell:{"<" if i < left else ">"}{width[i]}}' for i, cell in enumerate(row)) + ' |'
             for row in rows]
    lines.insert(1, '|' + '|'.join('-' * (w + 1) + ('-' if i < left else ':') for i, w in enumerate(width)) + '|')
    return '\n'.join(lines) + '\n'


def markdown(m, machine, rounds, shapes, usual):
    main = []
    for row, name, unit in ROWS:
        cells = [number(m.get((row, subject))) for subject in (FLOOR, PLUGIN, PEER)]
        of_floor = ratio(m, row, PLUGIN, FLOOR)
        behind = ratio(m, row, PLUGIN, PEER) if unit == '/s' else ratio(m, row, PEER, PLUGIN)
        main.append([name + (f', {unit}' if unit not in ('', '/s') else ''), *cells,
                     f'{of_floor:.2f} x' if of_floor else '',
                     f'{behind:.1f} x' if behind else ''])
    grown = [[f'{c} x {s}', number(m[('instructions', c, s), PLUGIN]), f'{m[("cpu", c, s), PLUGIN]:.2f}',
              f'{m[("cpu", c, s), PEER]:.2f}'] for c, s in shapes]
    goals = [[*cells, 'yes' if met else 'no'] for *cells, met in targets(m, shapes, usual)]
    return '\n'.join([
        '# How fast it is\n',
        f'Made by `make bench`: medians of {rounds} rounds, in which all programs take turns on one machine.\n',
        *(f'- {line}' for line in machine), '',
        'The floor is a ping-pong of 150 bytes between two processes (first line), an HTTP/2 server on nghttp2',
        'that gives one answer to everything (CPU, requests a second), or a program that does nothing (start,',
        '`unseal`). The Go plugin is Kubernetes\' own service library with AES-256-GCM.\n',
        table(['', 'floor', 'kmsplugin', 'Go plugin', 'of the floor', 'ahead of Go'], main),
        '## Growth\n',
        'One Encrypt, by connections x streams:\n',
        table(['load', 'instructions', 'CPU, µs', 'Go plugin: CPU, µs'], grown),
        '## Targets\n',
        table(['', 'is', 'should be', 'met'], goals)])


# ---------------------------------------------------------------- Plot

INK, SOFT, GRID = '#1f2328', '#59636e', '#d8dee4'
COLORS = {PLUGIN: '#0b62c4', PEER: '#c2571a', FLOOR: '#8a939c'}
WIDTH, PANEL, LEFT, TOP = 890, 400, 30, 40


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


def lines(x, y, title, series, ticks):
    """Curves over steps that double: [(subject, values)], with the first and the last value written out."""
    width, height = PANEL - 130, 120
    top = max(max(values) for _, values in series) * 1.1
    out = [text(x, y, title, 13, weight='bold')]
    base = y + 20 + height
    for share in (0, 0.5, 1):
        level = base - share * height
        out += [f'<line x1="{x + 40}" y1="{level}" x2="{x + 40 + width}" y2="{level}" stroke="{GRID}"/>',
                text(x + 34, level + 4, number(share * top) if share else '0', 11, SOFT, 'end')]
    place = [x + 62 + i * (width - 34) / (len(ticks) - 1) for i in range(len(ticks))]
    out += [text(px, base + 16, str(tick), 11, SOFT, 'middle') for px, tick in zip(place, ticks)]
    for subject, values in series:
        points = [(px, base - value / top * height) for px, value in zip(place, values)]
        path = ' '.join(f'{px:.1f},{py:.1f}' for px, py in points)
        color = COLORS[subject]
        out.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        out += [f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" fill="{color}"/>' for px, py in points]
        out += [text(points[i][0], points[i][1] - 8, number(values[i]), 11, color, 'middle') for i in (0, -1)]
        out.append(text(points[-1][0] + 20, points[-1][1] + 4, NAMES[subject], 11, color))
    return out


def svg(m, machine, shapes, usual):
    conns, streams = by_load(shapes, usual)
    right = LEFT + PANEL + 30
    out = [text(LEFT, 26, 'kmsplugin, a Go plugin, and the least there can be', 16, weight='bold'),
           *bars(LEFT, TOP + 22, 'Encrypt, one at a time, same core: p50', m, 'latency', 'µs'),
           *bars(right, TOP + 22, 'Server CPU per Encrypt, 8 connections x 32 streams', m, 'cpu-Encrypt', 'µs'),
           *bars(LEFT, TOP + 146, 'Encrypts a second on one core (h2load)', m, 'rate-Encrypt', ''),
           *bars(right, TOP + 146, 'From exec to the first Status', m, 'start', 'ms')]
    for x, shape, title in ((LEFT, conns, f'connections, {usual[1]} streams each'),
                            (right, streams, f'streams, on {usual[0]} connections')):
        ticks = [s[0] if shape is conns else s[1] for s in shape]
        out += lines(x, TOP + 272, f'CPU, µs, by {title}',
                     [(s, [m[('cpu', *one), s] for one in shape]) for s in (PLUGIN, PEER)], ticks)
        out += lines(x, TOP + 462, f'Instructions, by {title}',
                     [(PLUGIN, [m[('instructions', *one), PLUGIN] for one in shape])], ticks)
    out.append(text(LEFT, TOP + 650, machine[0], 11, SOFT))
    height = TOP + 664
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
            'font-family="system-ui, sans-serif">\n<rect width="100%" height="100%" fill="#ffffff"/>\n' +
            '\n'.join(out) + '\n</svg>\n')


def write(folder, m, machine, rounds, shapes, usual):
    """Writes both files into the folder and gives the table."""
    words = markdown(m, machine, rounds, shapes, usual)
    for name, content in (('bench.md', words), ('bench.svg', svg(m, machine, shapes, usual))):
        with open(os.path.join(folder, name), 'w', encoding='utf-8') as file:
            file.write(content)
    return words
