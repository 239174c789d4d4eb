"""doc/tour.html in a browser: a line `ok`, `not ok` or `skip` for each test. Needs Debian's chromium-driver, tidy and python3-html5lib.

chromedriver takes WebDriver's commands, JSON over HTTP on this machine, and passes on those of Chromium's own protocol.
"""
import base64
import http.client
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
PAGE = os.path.join(ROOT, 'doc/tour.html')
WAIT = 60               # seconds: the bound of what takes less than ten
WIDTHS, SCHEMES = (390, 1280), ('light', 'dark')
CONTRAST = 4.5          # WCAG 2, AA
PRINTED_MAX = 25        # pages of A4, all closed
RANGES_MIN = 300
ARGUMENTS = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
             '--disable-component-update', '--disable-sync', '--disable-breakpad', '--disable-crash-reporter']
OPEN = 'for (const d of document.querySelectorAll("details")) d.open = true'
OVERFLOWS = '''(() => { const root = document.scrollingElement; const wide = [];
for (const e of document.querySelectorAll('body *')) if (!e.closest('.wide, pre, svg') && e.getBoundingClientRect().right > innerWidth + 1) wide.push(e.outerHTML.slice(0, 80));
return [root.scrollWidth > innerWidth ? `the page has ${root.scrollWidth} pixels` : '', ...wide].filter(x => x); })()'''

# Each text against the background that it lies on. In a picture that is the last shape that holds the text's middle.
CONTRASTS = '''(() => { const parse = c => { const n = c.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
const light = c => { const [r, g, b] = c.map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b; };
const under = e => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor); if (c[3] === 1) return c; } return [255, 255, 255, 1]; };
const drawn = t => { const b = t.getBoundingClientRect(), x = b.x + b.width / 2, y = b.y + b.height / 2;
  const on = [...t.ownerSVGElement.querySelectorAll('rect, circle')].filter(s => { const r = s.getBoundingClientRect(); return r.left <= x && x <= r.right && r.top <= y && y <= r.bottom; });
  return on.length ? parse(getComputedStyle(on.at(-1)).fill) : under(t.ownerSVGElement); };
const bad = {}; let count = 0;
for (const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT); walk.nextNode();) {
  const e = walk.currentNode.parentElement;
  if (!walk.currentNode.data.trim() || e.closest('script')) continue;
  const svg = e.closest('svg'), style = getComputedStyle(e), a = light(parse(svg ? style.fill : style.color)), b = light(svg ? drawn(e) : under(e));
  const contrast = (Math.max(a, b) + .05) / (Math.min(a, b) + .05); count++;
  if (contrast < CONTRAST) bad[`${contrast.toFixed(2)} ${e.tagName}.${e.className.baseVal ?? e.className}`] = walk.currentNode.data.trim().slice(0, 40);
}
return [count, Object.entries(bad).map(([where, text]) => `${where}: ${text}`)]; })()'''


class Browser:
    def __init__(self, folder):
        env = {'PATH': os.environ['PATH'], **dict.fromkeys(('HOME', 'TMPDIR', 'XDG_CONFIG_HOME', 'XDG_CACHE_HOME', 'XDG_RUNTIME_DIR'), folder)}
        self.driver = subprocess.Popen(['chromedriver', '--port=0'], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env)
        self.base = ''
        try:
            port = next(match[1] for line in self.driver.stdout if (match := re.search(r'successfully on port (\d+)', line)))
            self.server = http.client.HTTPConnection('127.0.0.1', int(port), timeout=WAIT)
            options = {'args': [*ARGUMENTS, f'--user-data-dir={folder}/profile']}
            self.base = '/session/' + self.send('POST', '/session', {'capabilities': {'alwaysMatch': {
                'goog:chromeOptions': options, 'goog:loggingPrefs': {'performance': 'ALL'}}}})['sessionId']
        except BaseException:
            self.close()
            raise

    def send(self, verb, path, body=None):
        self.server.request(verb, self.base + path, json.dumps(body) if body is not None else None)
        value = json.loads(self.server.getresponse().read())['value']
        if isinstance(value, dict) and value.get('error'):
            raise AssertionError(f'{path}: {value["message"]}')
        return value

    def do(self, command, **parameters):
        return self.send('POST', '/goog/cdp/execute', {'cmd': command, 'params': parameters})

    def evaluate(self, text):
        """By Chromium itself: the page may have no scripts."""
        done = self.do('Runtime.evaluate', expression=text, returnByValue=True)
        assert 'exceptionDetails' not in done, done
        return done['result'].get('value')

    def show(self, width, scheme, scripts=True, fragment=''):
        self.do('Emulation.setScriptExecutionDisabled', value=not scripts)
        self.do('Emulation.setDeviceMetricsOverride', width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        self.do('Emulation.setEmulatedMedia', features=[{'name': 'prefers-color-scheme', 'value': scheme}])
        self.send('POST', '/url', {'url': 'about:blank'})
        self.send('POST', '/url', {'url': 'file://' + PAGE + fragment})

    def close(self):
        if self.base:
            self.send('DELETE', '')
        self.driver.terminate()
        self.driver.wait(WAIT)
        self.driver.stdout.close()


def test_fits(browser):
    for width, scheme in itertools.product(WIDTHS, SCHEMES):
        browser.show(width, scheme)
        for state in ('0', OPEN):
            browser.evaluate(state)
            wide = browser.evaluate(OVERFLOWS)
            assert not wide, f'at {width} pixels, {"open" if state == OPEN else "closed"}: {wide[:5]}'
    return f'{WIDTHS} pixels wide, in both schemes, closed and open'


def test_contrast(browser):
    for scheme in SCHEMES:
        browser.show(1280, scheme)
        browser.evaluate(OPEN)
        count, bad = browser.evaluate(CONTRASTS.replace('CONTRAST', str(CONTRAST)))
        assert count > 5000 and not bad, f'{scheme}, of {count} texts: {bad[:8]}'
    return f'{count} texts, at least {CONTRAST}'


def test_open(browser):
    """By click and by Enter with scripts and without; by a link without."""
    opened = '[...document.querySelectorAll(".part")].filter(d => d.open).length'
    for scripts in (True, False):
        browser.show(1280, 'light', scripts)
        count = browser.evaluate('document.querySelectorAll(".part").length')
        assert count >= RANGES_MIN, f'{count} ranges'
        browser.evaluate('for (const d of document.querySelectorAll("details:not(.part)")) d.open = true')
        for at in range(count):
            x, y = browser.evaluate(f'''(() => {{ const s = document.querySelectorAll(".part > summary")[{at}]; s.scrollIntoView({{block: "center"}});
                const b = s.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; }})()''')
            for kind in ('mousePressed', 'mouseReleased'):
                browser.do('Input.dispatchMouseEvent', type=kind, x=x, y=y, button='left', clickCount=1)
        assert browser.evaluate(opened) == count, f'{browser.evaluate(opened)} of {count} open by click'
        for at in range(count):
            browser.evaluate(f'document.querySelectorAll(".part > summary")[{at}].focus()')
            for kind in ('keyDown', 'keyUp'):
                browser.do('Input.dispatchKeyEvent', type=kind, key='Enter', code='Enter', windowsVirtualKeyCode=13, text='\r' * (kind == 'keyDown'))
        assert browser.evaluate(opened) == 0, f'{browser.evaluate(opened)} of {count} are not closed by Enter'
    browser.show(1280, 'light', False)
    for anchor in browser.evaluate('[...document.querySelectorAll(".part > .in")].map(e => e.id)'):
        browser.do('Page.navigate', url=f'file://{PAGE}#{anchor}')
        seen = browser.evaluate(f'(e => e.closest("details").open && e.checkVisibility())(document.getElementById("{anchor}"))')
        assert seen, f'a link to #{anchor} does not open it'
    return f'{count} ranges by click, Enter and link, and without JavaScript'


def test_network(browser):
    browser.send('POST', '/se/log', {'type': 'performance'})      # what was before
    browser.show(1280, 'light')
    browser.evaluate(OPEN)
    asked = []
    for entry in browser.send('POST', '/se/log', {'type': 'performance'}):
        message = json.loads(entry['message'])['message']
        if message['method'] == 'Network.requestWillBeSent':
            asked.append(message['params']['request']['url'])
    assert set(asked) - {'about:blank'} == {'file://' + PAGE}, f'asked for {asked}'
    return 'no request leaves the page'


def test_print(browser):
    browser.show(1280, 'light')
    pdf = base64.b64decode(browser.do('Page.printToPDF', printBackground=True, paperWidth=8.27, paperHeight=11.69)['data'])
    pages = len(re.findall(rb'/Type /Page\b', pdf))
    assert 10 <= pages <= PRINTED_MAX, f'{pages} pages'
    return f'{pages} pages of A4, all closed'


def test_valid(_):
    import html5lib
    parser = html5lib.HTMLParser()
    with open(PAGE, encoding='utf-8') as file:
        parser.parse(file.read())
    assert not parser.errors, parser.errors[:5]
    done = subprocess.run(['tidy', '-quiet', '-errors', PAGE], capture_output=True, text=True, check=False, timeout=WAIT)
    assert done.returncode == 0, done.stderr[:1000]
    return 'tidy and html5lib find no fault'


def check():
    """Gives how many tests pass, and how many fail."""
    needs = {'chromium-driver': shutil.which('chromedriver'), 'tidy': shutil.which('tidy'), 'python3-html5lib': importlib.util.find_spec('html5lib')}
    if not all(needs.values()):
        print('skip tour in a browser: lacks ' + ', '.join(package for package, found in needs.items() if not found))
        return 0, 0
    failed, tests = 0, (test_valid, test_fits, test_contrast, test_open, test_network, test_print)
    with tempfile.TemporaryDirectory(prefix='kmsplugin-tour-', ignore_cleanup_errors=True) as profile:
        browser = Browser(profile)
        try:
            for test in tests:
                name = 'tour in a browser ' + test.__name__.removeprefix('test_')
                try:
                    print(f'ok {name}: {test(browser)}')
                except AssertionError as error:
                    print(f'not ok {name}: {error}')
                    failed += 1
        finally:
            browser.close()
    return len(tests) - failed, failed


if __name__ == '__main__':
    passes, fails = check()
    print(f'{passes} passed, {fails} failed')
    sys.exit(1 if fails else 0)
