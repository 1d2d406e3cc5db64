"`nbs/localize.ipynb` in JupyterLab, Notebook or Voilà, in a real browser, and a hand that draws boxes on it."
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import nbformat
from jupyter_client import BlockingKernelClient
from playwright import sync_api as playwright

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = os.environ.get('CHROMIUM') or next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
SHOTS = ROOT / 'tests/artifacts'
# no name but this machine's is looked up: a page that asks the network for fonts (Voilà) would wait for them
FLAGS = ['--no-sandbox', '--disable-gpu', '--no-first-run', '--disable-background-networking',
         '--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1']
PHONE = dict(viewport=dict(width=390, height=844), device_scale_factor=3, has_touch=True, is_mobile=True)
# what the last cell writes down: what the kernel knows
PROBE = '''import json, os
from pathlib import Path
from ipykernel.connect import get_connection_file
seen = [widget.c.canvas.boxes]

def probe(*_):
    c = widget.c
    if c.canvas.boxes != seen[-1]: seen.append(c.canvas.boxes)
    state = dict(boxes=c.canvas.boxes, sent=len(seen), marks=c.canvas.marks, other=c.other.marks, photo=c.photo.value,
                 heat=len(c.canvas.overlay), target=c.target.value, threshold=c.threshold.value,
                 weights=c.weights.value, text=c.message.value, x=c.x.value, several=c.several.value,
                 pid=os.getpid(), connection=get_connection_file())
    Path('state.tmp').write_text(json.dumps(state))
    os.replace('state.tmp', 'state.json')

widget.c.message.observe(probe, 'value')
widget.c.canvas.observe(probe, ['boxes', 'overlay'])  # two boxes may be answered in the same words and milliseconds
widget.c.several.observe(probe, 'value')
probe()'''


def prepare(folder, checkpoint='', oneshot='', photo='chelsea'):
    "The notebook in `folder`, with these parameters and a last cell that writes down what the kernel knows."
    nb = nbformat.read(ROOT / 'nbs/localize.ipynb', 4)
    cell, = [c for c in nb.cells if 'parameters' in c.metadata.get('tags', [])]
    cell.source = f'checkpoint, oneshot, photo = {str(checkpoint)!r}, {str(oneshot)!r}, {photo!r}'
    nb.cells.append(nbformat.v4.new_code_cell(PROBE))
    nbformat.write(nb, folder / 'localize.ipynb')


# how each program is started, and where it then shows the notebook
FRONTS = {'jupyterlab': (['--LabApp.expose_app_in_browser=True', '--ServerApp.root_dir={folder}'], '/lab/tree/localize.ipynb?reset&'),
          'notebook': (['--JupyterNotebookApp.expose_app_in_browser=True', '--ServerApp.root_dir={folder}'], '/notebooks/localize.ipynb?'),
          'voila': (['{folder}/localize.ipynb'], '/?')}


@contextmanager
def served(front, folder, home):
    "The notebook's address in JupyterLab, Notebook or Voilà, on a free port of this machine, with settings of its own."
    token, (words, address) = secrets.token_hex(16), FRONTS[front]
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    places = dict(JUPYTER_CONFIG_DIR='cfg', JUPYTER_DATA_DIR='data', JUPYTER_RUNTIME_DIR='run', IPYTHONDIR='ipy',
                  JUPYTERLAB_SETTINGS_DIR='settings', JUPYTERLAB_WORKSPACES_DIR='ws')
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get('PYTHONPATH'))))
    env = os.environ | {k: str(home / v) for k, v in places.items()}
    env |= {'OMP_NUM_THREADS': '1', 'JUPYTER_PREFER_ENV_PATH': '1', 'PYTHONPATH': path}
    news = home / 'settings/@jupyterlab/apputils-extension'
    news.mkdir(parents=True)
    (news / 'notification.jupyterlab-settings').write_text('{"fetchNews": "false", "checkForUpdates": false}')
    command = [sys.executable, '-m', front, '--no-browser', f'--port={port}', *(w.format(folder=folder) for w in words)]
    if front == 'voila': command += ['--Voila.ip=127.0.0.1', '--Voila.port_retries=0']
    else: command += ['--allow-root', '--ip=127.0.0.1', '--ServerApp.port_retries=0', '--ServerApp.shutdown_no_activity_timeout=300',
                      f'--IdentityProvider.token={token}']
    with open(home / 'server.log', 'w') as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=env, start_new_session=True, cwd=folder)
    try:
        url, end = f'http://127.0.0.1:{port}', time.monotonic() + 300
        while True:
            try:
                with socket.create_connection(('127.0.0.1', port), timeout=2): break
            except OSError: time.sleep(.25)
            assert time.monotonic() < end and process.poll() is None, (home / 'server.log').read_text()[-3000:]
        yield f'{url}{address}token={token}'
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try: process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


# Texts of the elements under `root` with a contrast to their ground (WCAG 2) below 4.5, or below 3 where they are large
PALE = """root => {
  const rgba = c => { const m = c.match(/[\\d.]+/g).map(Number); return m.length < 4 ? [...m, 1] : m; };
  const over = (top, below) => [0, 1, 2].map(k => top[k] * top[3] + below[k] * (1 - top[3]));
  const ground = e => {
    if (!e) return [255, 255, 255];
    const c = rgba(getComputedStyle(e).backgroundColor);
    return c[3] === 1 ? c : over(c, ground(e.parentElement));
  };
  const light = c => c.slice(0, 3).map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, k) => sum + v * [.2126, .7152, .0722][k], 0);
  return [...root.querySelectorAll('*')].filter(e => e.checkVisibility() && !e.closest('svg')
    && [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())).flatMap(e => {
      const style = getComputedStyle(e), below = ground(e), text = over(rgba(style.color), below);
      const [a, b] = [light(text), light(below)].sort((x, y) => y - x), ratio = (a + .05) / (b + .05);
      const least = parseFloat(style.fontSize) >= 24 ? 3 : 4.5;
      return ratio < least ? [`${ratio.toFixed(1)} ${e.tagName}.${e.className}: ${e.textContent.trim().slice(0, 40)}`] : [];
    });
}"""
RUN_ALL = """async () => {
  const w = window.jupyterapp.shell.currentWidget;  // the idle dot shows before the kernel is connected: wait, or Run All is lost
  await w.context.ready; await w.sessionContext.ready; await w.sessionContext.session.kernel.info;
  await window.jupyterapp.commands.execute('notebook:run-all-cells'); }"""


def run_all(page):
    "Every cell of the notebook that the page shows, and wait until all have ended."
    page.wait_for_function('window.jupyterapp?.shell?.currentWidget?.sessionContext !== undefined')
    page.evaluate(RUN_ALL)


@contextmanager
def chromium():
    "A browser without a window; one is open at a time, for as many pages as are wanted."
    with playwright.sync_playwright() as pw:
        browser = pw.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield browser
        browser.close()


def run(page, front, folder, load=None):
    "The page loaded by `load`, if it is given; every cell run; wait until the widget is drawn and the last cell has run."
    (folder / 'state.json').unlink(missing_ok=True)
    page.evaluate('document.querySelectorAll(".updetr-photo").forEach(e => { e.dataset.before = 1; })')
    if load: load()
    if front != 'voila': run_all(page)  # Voilà runs all cells by itself
    page.wait_for_selector('.updetr-photo:not([data-before]) [data-box]')
    playwright.expect(page.locator('[data-before]')).to_have_count(0)
    end = time.monotonic() + 300
    while not (folder / 'state.json').exists():
        assert time.monotonic() < end, f'{front} has not run the last cell'
        page.wait_for_timeout(100)


@contextmanager
def opened(browser, front, folder, home, device=None):
    "The notebook in a page of the browser, opened and run; `device`: options of a page, such as PHONE."
    with served(front, folder, home) as address:
        page = browser.new_page(**device or dict(viewport=dict(width=1300, height=1000)))
        page.set_default_timeout(300_000)
        run(page, front, folder, lambda: page.goto(address, wait_until='commit'))
        yield page
        page.close()


class Hand:
    "Do what a person does, in the photo's pixels, and what the kernel then knows."
    def __init__(self, page, folder): self.page, self.folder = page, folder

    def python(self, code):
        "Run it in the notebook's kernel, as another cell would."
        client = BlockingKernelClient()
        client.load_connection_file(self.state()['connection'])
        client.start_channels()
        try: reply = client.execute(code, reply=True, timeout=120)['content']
        finally: client.stop_channels()
        assert reply['status'] == 'ok', reply

    def settle(self):
        "All that the browser has sent has come to the kernel: messages are taken in turn, and these two are the last."
        for on in (True, False):
            self.page.get_by_label('several patches').set_checked(on)
            self.wait(lambda s, on=on: s['several'] == on)

    def focus(self):
        "The number of the patch that has the focus; None: something else has it."
        return self.page.evaluate('document.activeElement?.dataset?.box ?? null')

    def photo(self, which=0): return self.page.locator('.updetr-photo').nth(which)
    def state(self): return json.loads((self.folder / 'state.json').read_text())

    def shot(self, name):
        "A screenshot to be looked at, once what the kernel sent last is drawn."
        SHOTS.mkdir(exist_ok=True)
        self.page.evaluate('new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))')
        self.page.screenshot(path=str(SHOTS / f'{name}.png'))

    def tries(self, what):
        "Endless, a little pause after each; an error that names `what` after two minutes."
        end = time.monotonic() + 120
        while time.monotonic() < end:
            yield
            self.page.wait_for_timeout(50)
        raise AssertionError(f'waited for {what}; the kernel says {self.state()}')

    def wait(self, true, what='the kernel'):
        "The kernel's state, once `true` holds of it."
        for _ in self.tries(what):
            if true(state := self.state()): return state

    def path(self, *points):
        "Places in the photo, as places on the screen."
        svg = self.photo()
        svg.scroll_into_view_if_needed()
        r, width = svg.bounding_box(), float(svg.get_attribute('viewBox').split()[2])
        scale = r['width'] / width
        return [(r['x'] + x * scale, r['y'] + y * scale) for x, y in points]

    def drag(self, x, y, x2, y2, during=None):
        "In steps, as a hand does; `during` is called before the button is released."
        first, *rest = self.path((x, y), ((x + x2) / 2, (y + y2) / 2), (x2, y2))
        self.page.mouse.move(*first)
        self.page.mouse.down()
        for point in rest: self.page.mouse.move(*point, steps=4)
        if during: during()
        self.page.mouse.up()

    def touch(self, x, y, x2, y2):
        "The same with a finger."
        screen = self.page.context.new_cdp_session(self.page)
        kinds = ['touchStart', 'touchMove', 'touchMove', 'touchEnd']
        path = self.path((x, y), ((x + x2) / 2, (y + y2) / 2), (x2, y2))
        for kind, place in zip(kinds, [*path, None]):
            points = [dict(x=place[0], y=place[1])] if place else []
            screen.send('Input.dispatchTouchEvent', dict(type=kind, touchPoints=points))

    def drawn(self, which=0):
        "The query boxes on the screen."
        lines = self.photo(which).locator('.queries .line:not(.light)').all()
        boxes = [[int(e.get_attribute(k)) for k in ('x', 'y', 'width', 'height')] for e in lines]
        return [[x, y, x + w, y + h] for x, y, w, h in boxes]

    def answers(self, which=0):
        "The texts of the answers on the screen."
        return self.photo(which).locator('.labels text').all_text_contents()

    def box(self, *box):
        "Drag one box, backwards too, and wait for its answer."
        self.drag(*box)
        return self.wait(lambda s: len(s['boxes']) == 1 and s['boxes'][0] == list(box) and 'found' in s['text'])

    def button(self, name):
        "The widget's button with this name."
        return self.page.locator('.updetr-widget').get_by_role('button', name=name, exact=True)

    def control(self, kind, name):
        "The control of this kind with this label."
        return self.page.locator(kind).filter(has=self.page.locator('label', has_text=re.compile(f'^{name}$')))

    def choose(self, name, option): self.control('.widget-dropdown', name).locator('select').select_option(label=option)

    def upload(self, name, button):
        with self.page.expect_file_chooser() as chooser: self.page.locator('.updetr-upload button', has_text=button).click()
        chooser.value.set_files(str(self.folder / name))
