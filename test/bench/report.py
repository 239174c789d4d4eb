"""What run.py measured, as a table (bench.md) and as a plot (bench.svg)."""
import os
from html import escape

PLUGIN, PEER, FLOOR = 'plugin', 'peer', 'floor'
NAMES = {PLUGIN: 'kmsplugin', PEER: 'Go plugin', FLOOR: 'floor'}

# Measurement, what a reader calls it, its unit.
ROWS = [
    ('latency', 'Encrypt, one at a time, client on the same core: p50', 'µs'),
    ('latency-h2load', 'the same with h2load: mean', 'µs'),
    ('go-latency', 'the same with grpc-go on another core: p50', 'µs'),
    ('cpu-Encrypt', 'server CPU per Encrypt, 8 connections x 32 streams', 'µs'),
    ('cpu-Decrypt', 'server CPU per Decrypt', 'µs'),
    ('cpu-Status', 'server CPU per Status', 'µs'),
    ('cpu-Encrypt-v1', 'server CPU per v1 Encrypt', 'µs'),
    ('cpu-Decrypt-v1', 'server CPU per v1 Decrypt', 'µs'),
    ('rate-Encrypt', 'Encrypts a second, h2load, 8 x 32', '/s'),
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


def targets(m, shapes, usual):
    """(what, is, should be, met)"""
    conns = [s for s in shapes if s[1] == usual[1]]
    streams = [s for s in shapes if s[0] == usual[0]]

    def most(what, value, limit, unit=''):
        return what, f'{value:,.2f}{unit}', f'at most {limit:,}{unit}', value <= limit

    def least(what, value, limit, unit=''):
        return what, f'{value:,.2f}{unit}', f'at least {limit:,}{unit}', value >= limit
    cpu = [m[('cpu', *shape), PLUGIN] for shape in streams]
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
        most('CPU per Encrypt, 250 streams to 1', cpu[-1] / cpu[0], 1, ' x'),
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
    lines = ['| ' + ' | '.join(cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, width))) + ' |'
             for row in rows]
    lines.insert(1, '|' + '|'.join('-' * (w + 2) if i < left else '-' * (w + 1) + ':' for i, w in enumerate(width)) + '|')
    return '\n'.join(lines) + '\n'


def markdown(m, machine, rounds, shapes, usual):
    main = []
    for row, name, unit in ROWS:
        cells = [number(m.get((row, subject))) for subject in (FLOOR, PLUGIN, PEER)]
        of_floor, of_peer = ratio(m, row, PLUGIN, FLOOR), ratio(m, row, PEER, PLUGIN)
        main.append([name + (f', {unit}' if unit not in ('', '/s') else ''), *cells,
                     f'{of_floor:.2f}' if of_floor else '', f'{of_peer:.2f}' if of_peer else ''])
    grown = [[f'{c} x {s}', number(m[('instructions', c, s), PLUGIN]), f'{m[("cpu", c, s), PLUGIN]:.2f}',
              f'{m[("cpu", c, s), PEER]:.2f}'] for c, s in shapes]
    goals = [[what, value, limit, 'yes' if met else 'no'] for what, value, limit, met in targets(m, shapes, usual)]
    return '\n'.join([
        '# How fast it is\n',
        f'Made by `make bench`: medians of {rounds} rounds, all programs taking turns on the same machine.\n',
        *(f'- {line}' for line in machine), '',
        'The floor is a ping-pong of 150 bytes between two processes (latency), an HTTP/2 server on nghttp2 that gives one',
        'answer to everything (CPU, requests a second), or a program that does nothing (start, `unseal`). The Go plugin is',
        'Kubernetes\' own service library with AES-256-GCM.\n',
        table(['', 'floor', 'kmsplugin', 'Go plugin', 'kmsplugin : floor', 'Go : kmsplugin'], main),
        '## Growth\n',
        'One Encrypt, by connections x streams:\n',
        table(['load', 'instructions', 'CPU, µs', 'Go plugin: CPU, µs'], grown),
        '## Targets\n',
        table(['', 'is', 'should be', 'met'], goals)])


# ---------------------------------------------------------------- Plot

INK, SOFT, GRID = '#1f2328', '#59636e', '#d8dee4'
COLORS = {PLUGIN: '#0b62c4', PEER: '#c2571a', FLOOR: '#8a939c'}
WIDTH, PANEL, LEFT, TOP = 860, 400, 30, 40


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
    width, height = PANEL - 80, 120
    top = max(max(values) for _, values in series) * 1.1
    out = [text(x, y, title, 13, weight='bold')]
    base = y + 20 + height
    for share in (0, 0.5, 1):
        level = base - share * height
        out += [f'<line x1="{x + 40}" y1="{level}" x2="{x + 40 + width}" y2="{level}" stroke="{GRID}"/>',
                text(x + 34, level + 4, number(share * top) if share else '0', 11, SOFT, 'end')]
    place = [x + 52 + i * (width - 24) / (len(ticks) - 1) for i in range(len(ticks))]
    out += [text(px, base + 16, str(tick), 11, SOFT, 'middle') for px, tick in zip(place, ticks)]
    for subject, values in series:
        points = [(px, base - value / top * height) for px, value in zip(place, values)]
        path = ' '.join(f'{px:.1f},{py:.1f}' for px, py in points)
        out.append(f'<polyline points="{path}" fill="none" stroke="{COLORS[subject]}" stroke-width="2"/>')
        out += [f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" fill="{COLORS[subject]}"/>' for px, py in points]
        for i in (0, -1):
            out.append(text(points[i][0], points[i][1] - 8, f'{values[i]:,.3g}' if values[i] < 100 else number(values[i]), 11,
                            COLORS[subject], 'middle'))
    return out


def svg(m, machine, shapes, usual):
    conns = [s for s in shapes if s[1] == usual[1]]
    streams = sorted(s for s in shapes if s[0] == usual[0])
    right = LEFT + PANEL + 30
    out = [text(LEFT, 26, 'kmsplugin, a Go plugin, and the least there can be', 16, weight='bold'),
           *bars(LEFT, TOP + 22, 'Encrypt, one at a time, same core: p50', m, 'latency', 'µs'),
           *bars(right, TOP + 22, 'Server CPU per Encrypt, 8 connections x 32 streams', m, 'cpu-Encrypt', 'µs'),
           *bars(LEFT, TOP + 146, 'Encrypts a second on one core (h2load)', m, 'rate-Encrypt', ''),
           *bars(right, TOP + 146, 'From exec to the first Status', m, 'start', 'ms')]
    for x, shape, title in ((LEFT, conns, f'connections, {usual[1]} streams each'), (right, streams, f'streams, on {usual[0]} connections')):
        ticks = [s[0] if shape is conns else s[1] for s in shape]
        out += lines(x, TOP + 272, f'CPU per Encrypt, µs, by {title}',
                     [(s, [m[('cpu', *one), s] for one in shape]) for s in (PLUGIN, PEER)], ticks)
        out += lines(x, TOP + 462, f'Instructions per Encrypt, by {title}',
                     [(PLUGIN, [m[('instructions', *one), PLUGIN] for one in shape])], ticks)
    out.append(text(LEFT, TOP + 650, machine[0], 11, SOFT))
    height = TOP + 664
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH + 30} {height}" width="{WIDTH + 30}" height="{height}" '
            f'font-family="system-ui, sans-serif">\n<rect width="100%" height="100%" fill="#ffffff"/>\n' + '\n'.join(out) + '\n</svg>\n')


def write(folder, m, machine, rounds, shapes, usual):
    """Writes both files into the folder and gives the table."""
    words = markdown(m, machine, rounds, shapes, usual)
    for name, content in (('bench.md', words), ('bench.svg', svg(m, machine, shapes, usual))):
        with open(os.path.join(folder, name), 'w', encoding='utf-8') as file:
            file.write(content)
    return words
