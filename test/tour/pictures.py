"""The pictures of doc/tour.md: SVG files in doc/tour/, from one text, pictures.txt, which says how they are described."""
import os
from xml.sax.saxutils import escape

HERE = os.path.dirname(os.path.abspath(__file__))
SOURCE = os.path.join(HERE, 'pictures.txt')
TARGET = os.path.join(os.path.dirname(os.path.dirname(HERE)), 'doc/tour')

# Each class: fill, stroke and text colour, in light viewers and in dark ones.
COLOURS = {
    'page': (('#ffffff', 'none'), ('#0d1117', 'none')),
    'zone': (('#f6f8fa', '#d0d7de'), ('#161b22', '#30363d')),
    'box': (('#ffffff', '#8c959f'), ('#21262d', '#8b949e')),
    'key': (('#fff3c4', '#9a6700'), ('#3d2e00', '#d29922')),
    'step': (('#ddf4ff', '#0969da'), ('#0c2d6b', '#58a6ff')),
    'line': (('none', '#57606a'), ('none', '#8b949e')),
    'tip': (('#57606a', 'none'), ('#8b949e', 'none')),
    'ink': (('#1f2328', 'none'), ('#e6edf3', 'none')),
    'faint': (('#59636e', 'none'), ('#9198a1', 'none')),
}


def paint(name):
    """Light colours as attributes, for viewers that know no style sheets."""
    fill, stroke = COLOURS[name][0]
    return f'class="{name}" fill="{fill}"' + (f' stroke="{stroke}"' if stroke != 'none' else '')


def dark_style():
    rules = ' '.join(f'.{name} {{ fill: {fill}; stroke: {stroke} }}' for name, (_, (fill, stroke)) in COLOURS.items())
    return f'<style>@media (prefers-color-scheme: dark) {{ {rules} }}</style>'


def label(x, y, words, size=13, anchor='middle', name='ink', bold=False):
    weight = ' font-weight="bold"' if bold else ''
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}"{weight} {paint(name)}>{escape(words)}</text>'


def area(kind, numbers, words):
    """A zone has its name at the top left; the others have a line in the middle, and smaller lines behind a | each."""
    x, y, w, h = numbers
    shape = f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="{6 if kind == "step" else 3}" {paint(kind)}/>'
    if kind == 'zone':
        return [shape, label(x + 10, y + 20, words, 13, 'start', 'faint', True)]
    first, *more = [part.strip() for part in words.split('|')]
    top = y + h / 2 + 4.5 - 7.5 * len(more)
    return [shape, label(x + w / 2, top, first, 13), *(label(x + w / 2, top + 15 * n, part, 11, name='faint')
                                                      for n, part in enumerate(more, 1))]


def arrow(points):
    """A line through the points, with a tip at the last, which is reached straight from one side."""
    (x0, y0), (x1, y1) = points[-2:]
    dx, dy = (x1 > x0) - (x1 < x0), (y1 > y0) - (y1 < y0)
    back = [(x1 - 8 * dx + 4 * s * dy, y1 - 8 * dy + 4 * s * dx) for s in (1, -1)]
    stem = points[:-1] + [(x1 - 8 * dx, y1 - 8 * dy)]
    def text(pairs):
        return ' '.join(f'{x},{y}' for x, y in pairs)
    return [f'<polyline points="{text(stem)}" stroke-width="1.5" {paint("line")}/>',
            f'<polygon points="{text([(x1, y1), *back])}" {paint("tip")}/>']


def item(line):
    kind, rest = line.split(None, 1)
    if kind == 'line':
        return arrow([tuple(int(n) for n in pair.split(',')) for pair in rest.split()])
    if kind == 'note':
        x, y, words = rest.split(None, 2)
        return [label(int(x), int(y), words, 11, 'start', 'faint')]
    assert kind in ('zone', 'box', 'key', 'step'), line
    *numbers, words = rest.split(None, 4)
    return area(kind, [int(n) for n in numbers], words)


def all_pictures():
    """Path and text of each picture."""
    with open(SOURCE, encoding='utf-8') as file:
        lines = [line.strip() for line in file if line.strip() and not line.startswith('#')]
    found, parts = [], []
    for line in [*lines, 'picture end 0 0 end']:
        if not line.startswith('picture '):
            parts += item(line)
            continue
        if parts:
            found.append((os.path.join(TARGET, name + '.svg'), '\n'.join([*head, *parts, '</svg>', ''])))
        _, name, width, height, title = line.split(None, 4)
        head = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
                f'font-family="system-ui, sans-serif">', dark_style(), f'<title>{escape(title)}</title>',
                f'<rect width="100%" height="100%" {paint("page")}/>', label(16, 26, title, 15, 'start', bold=True)]
        parts = []
    return found
