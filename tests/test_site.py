"The site of `make docs`: built from a small project, its formulas, links and search."
import functools
import html
import http.server
import json
import re
import shutil
import threading
from html.parser import HTMLParser

import nbformat
import pytest

from conftest import ROOT
from tools.pages import linked, shown
from tools.site import CHAPTERS, Links, faults, finish, in_words, make
from updetr.core.report import markdown_table

CELLS = {'00_first': ['# First\n\n> one\n\nThe queries $N/M$ and <b>$a_1$</b>; see [the other](01_second.ipynb) and '
                      '[a part of it](01_second.ipynb#here).',
                      '#| default_exp first', '#| export\nprice = "$5 and $6"\ndef twice(): ...\ndef me(): ...', '#| hide\nsecret = 1'],
         '01_second': ['# Second\n\n> two\n\n$$\\frac{x}{y}$$\n\n## Here\n\nzirconium is `Asked`, `Asked.me(1)`, `own`, `me` and `twice`',
                       '#| export\nclass Asked:\n    def me(self): ...\ndef twice(): ...', 'def own(x): return x + 1.5 is None  # why']}


EVIL = '<img src=x onerror=alert(1)>'  # a folder, a class, a run: names that others have given
ACTIVE = f'<script>alert(1)</script> {EVIL} [a](javascript:alert(1)) [b]: data:text/html,x'


DOT = 'iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=='


def hostile_report():
    "An executed notebook whose outputs hold names that would run in a page: one of our tables, and what somebody else's code printed."
    outputs = [nbformat.v4.new_output('stream', text=ACTIVE),
               *(nbformat.v4.new_output('display_data', {'text/plain': ACTIVE} | more)
                 for more in ({'text/markdown': markdown_table([{'class': ACTIVE, ACTIVE: 1}])}, {'text/markdown': ACTIVE},
                              {'text/html': ACTIVE}, {'application/javascript': 'alert(1)'}, {'image/svg+xml': f'<svg>{ACTIVE}</svg>'}))]
    outputs.append(nbformat.v4.new_output('display_data', {'image/png': DOT}))
    head = nbformat.v4.new_markdown_cell('# Report\n\nWhat *is* seen: [a dot](../README.md).')
    return nbformat.v4.new_notebook(cells=[head, nbformat.v4.new_code_cell('1', outputs=outputs)])


class Running(HTMLParser):
    "Return what of a page would run `alert`."
    def __init__(self, text):
        super().__init__()
        self.found, self.script = [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.script = tag == 'script'
        evil = re.compile(r'\s*(javascript|vbscript|data:text)', re.I)
        self.found += [(tag, k, v) for k, v in attrs if k.startswith('on') or evil.match(v or '')]

    def handle_data(self, data):
        if self.script and 'alert' in data: self.found.append(('script', data))

    def handle_endtag(self, tag): self.script = False


def write_project(root, cells):
    for folder in ('nbs', 'reports'): (root / folder).mkdir(parents=True)
    (root / 'README.md').write_text('# small\n\n[first](nbs/00_first.ipynb)')
    (root / 'LICENSE').write_text('free')
    (root / 'reports' / 'README.md').write_text('# Reports')
    (root / 'reports' / EVIL).mkdir()
    nbformat.write(hostile_report(), root / 'reports' / EVIL / 'first.ipynb')
    # what Jupyter leaves beside a notebook that was opened and saved
    (root / 'reports' / EVIL / '.ipynb_checkpoints').mkdir()
    nbformat.write(hostile_report(), root / 'reports' / EVIL / '.ipynb_checkpoints' / 'first-checkpoint.ipynb')
    for name, (head, *code) in cells.items():
        nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(head), *map(nbformat.v4.new_code_cell, code)])
        nbformat.write(nb, root / 'nbs' / f'{name}.ipynb')


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    root = tmp_path_factory.mktemp('project')
    write_project(root, CELLS)
    make(root, root / '_docs')
    return root / '_docs' / 'site'


def test_pages_show_what_a_reader_wants(site):
    first, second = ((site / 'nbs' / f'{name}.html').read_text() for name in CELLS)
    assert 'secret' not in first and 'default_exp' not in first and '#| export' not in first and 'price' in first
    assert first.count('<math') == 2 and '$5 and $6' in first and 'display="block"' in second and 'mfrac' in second
    assert 'href="01_second.html"' in first and 'href="01_second.html#here"' in first and 'here' in Links(second).places


def test_names_do_not_run_in_the_pages(site):
    page, = site.glob('reports/*/first.html')
    text = page.read_text()
    assert Running(text).found == [] and Running((site / 'index.html').read_text()).found == []
    assert html.unescape(re.sub(r'<[^>]*>', '', text)).count('<script>alert(1)</script>') >= 3          # it can still be read
    assert Running('<p onclick="alert(1)">').found and Running('<script>alert(1)</script>').found       # the test sees


def test_names_lead_to_where_they_are_defined(site):
    "The package's, if there is one of that name, no method has it, and the page does not define it for itself."
    page = (site / 'nbs/01_second.html').read_text()
    link = r'<a href="01_second.html#(cell-id=[^"]*)"><code>([^<]*)</code></a>'
    places, names = zip(*re.findall(link, page))
    assert names == ('Asked', 'Asked.me(1)') and set(places) <= Links(page).places
    assert all(f'<code>{name}</code>' in page for name in ('own', 'me', 'twice'))
    known, page = {'Asked': (ROOT / 'nbs/01_second.ipynb', 'c1')}, ROOT / 'nbs/guides/a.ipynb'
    assert linked('`Asked`', page, known) == '[`Asked`](../01_second.ipynb#cell-id=c1)'
    for text in ('[`Asked`](b.ipynb)', '# `Asked`', '```\n`Asked`\n```', '`Asked`s `x`'.replace('Asked', 'asked.py'), '<b t="`Asked`">'):
        assert linked(text, page, known) == text


def test_a_report_opens_with_its_result():
    "The sections in which nothing comes out follow the others; of the code, what was set is left. The stored report stays as it is."
    path = ROOT / 'reports/table1_voc/table1_voc.ipynb'
    before, cells = path.read_bytes(), shown(path, report_of='../../nbs/experiments/table1_voc.ipynb').cells
    heads = re.findall(r'^## (.*)', '\n'.join(c.source for c in cells if c.cell_type == 'markdown'), re.M)
    assert heads[0] == 'Plan, numbers, claims' and heads[-1] == 'Parameters'
    assert len(heads) == len(re.findall(r'"## ', before.decode())) == 5 and path.read_bytes() == before
    code = [c for c in cells if c.cell_type == 'code' and c.metadata.get('tags') != ['silent']]
    assert [c.metadata['tags'] for c in code] == [['injected-parameters']] and 'table1_voc.ipynb' in cells[1].source


def test_pictures_have_words_and_pages_a_description(site, tmp_path):
    first = (site / 'nbs/00_first.html').read_text()
    assert '<meta name="description" content="one">' in first
    assert all(p.read_text().count('<meta name="description"') == 1 for p in site.rglob('*.html'))
    assert 'alt="Report: What is seen"' in next(site.glob('reports/*/first.html')).read_text()
    (tmp_path / 'a.html').write_text('<img src="a.png" alt=" "><img src="b.png"><img src="c.png" alt="words">')
    (tmp_path / 'c.png').write_bytes(b'')
    assert sorted(f for f in faults(tmp_path) if 'without' in f) == [f'a.html: picture without a text: {x}.png' for x in 'ab']


def test_the_search_finds_words(site):
    found = json.loads((site / 'search' / 'search_index.json').read_text())['docs']
    assert {d['location'].split('#')[0] for d in found if 'zirconium' in d['text']} == {'nbs/01_second.html'}
    assert not [d for d in found if re.search(r'\$\$|\\frac|¶|In \[|Copied', d['title'] + d['text'])]
    assert any('x/y' in d['text'] for d in found) and sum(d['text'].count('def own') for d in found) == 1  # code once
    assert in_words(r'\mathcal{L} = \Big\lVert \frac{p}{\lVert p\rVert_2}\Big\rVert_2^2') == 'ℒ=‖p/(‖p‖_2)‖_2^2'


def test_nothing_is_fetched_from_the_web(site):
    loaded = re.compile(r'<(?:script|link|img)\b[^>]*?(?:src|href)="(?:https?:)?//')
    assert not [p.name for p in site.rglob('*.html') if loaded.search(p.read_text())]
    assert all((p.parent / re.search(r'src="([^"]*worker.js)"', p.read_text())[1]).exists() for p in (site / 'nbs').glob('*.html'))


@pytest.fixture(scope='module')
def browser():
    tools = pytest.importorskip('tools.browser', reason='needs playwright: pip install playwright')
    if not tools.CHROMIUM: pytest.skip('needs Chromium: apt install chromium, or name it by the environment variable CHROMIUM')
    with tools.chromium() as chromium: yield chromium


def search(page, address):
    page.set_default_timeout(120_000)
    page.goto(address)
    page.locator('.md-search__input').click()
    page.keyboard.type('zirconium', delay=20)
    assert '01_second.html' in page.locator('.md-search-result__link').first.get_attribute('href')


def test_the_search_works_without_a_server(site, browser):
    "Typed into the page as it lies on the disk."
    search(browser.new_page(viewport=dict(width=1300, height=900)), (site / 'nbs/00_first.html').as_uri())


def test_the_search_is_loaded_when_it_is_used(site, browser):
    "From a server: several MB, for those who search."
    class Server(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_): asked.append(self.path)
    asked = []
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Server, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        page, address = browser.new_page(), f'http://127.0.0.1:{server.server_port}/nbs/00_first.html'
        page.goto(address, wait_until='networkidle')
        assert '/nbs/00_first.html' in asked and not [p for p in asked if 'search_index' in p]
        search(page, address)
        assert '/search/search_index.json' in asked
    finally: server.shutdown(), server.server_close()


def test_a_page_can_be_read_in_the_dark(site, browser):
    "Text and code have a contrast of 4.5 to their ground, and pictures a light one: they are drawn in black."
    from tools.browser import PALE
    for scheme, name in (('light', 'default'), ('dark', 'slate')):
        page = browser.new_page(color_scheme=scheme)
        page.goto(next(site.glob('reports/*/first.html')).as_uri())
        assert page.locator('body').get_attribute('data-md-color-scheme') == name
        ground = page.locator('.md-content img').first.evaluate('e => getComputedStyle(e).backgroundColor')
        assert scheme == 'light' or ground == 'rgb(255, 255, 255)'
        page.goto((site / 'nbs/01_second.html').as_uri())
        assert page.locator('.md-content').evaluate(PALE) == [] and page.locator('pre :is(.k, .o, .mf, .c1)').count() > 3
        page.add_style_tag(content='.jp-Cell pre, .jp-Cell pre * {background: #777 !important; transition: none !important}')
        assert page.locator('.md-content').evaluate(PALE)  # the test sees


def test_a_dead_link_is_an_error(site, tmp_path):
    assert list(faults(site)) == []
    shutil.copytree(site, tmp_path / 'site')
    (tmp_path / 'site' / 'nbs' / '01_second.html').unlink()
    assert 'nbs/00_first.html: 01_second.html' in set(faults(tmp_path / 'site'))
    write_project(tmp_path / 'bad', CELLS | {'01_second': ['# Second\n\n> two\n\n[no](nowhere.ipynb) [no](00_first.ipynb#Nowhere)']})
    with pytest.raises(ValueError, match='(?s)3 dead links.*#here.*#Nowhere.*nowhere'): make(tmp_path / 'bad', tmp_path / 'out')


def test_formulas_and_code_are_told_apart():
    assert 'Vert' not in finish(r'<p>$\lVert x \rVert_2^2$</p>')
    assert '‖' in finish(r'<p>$\Big\lVert x \Big\rVert_2$</p>') and 'Vert' not in finish(r'<p>$\Big\lVert x\rVert$</p>')
    page = '<p>$x^2$</p><pre>$y$</pre><code>$z$</code><a href="https://a.b/c.ipynb">c</a><a href="d.ipynb#e">d</a>'
    done = finish(page)
    assert done.count('<math') == 1 and '<pre>$y$</pre><code>$z$</code>' in done
    assert 'https://a.b/c.ipynb' in done and 'href="d.html#e"' in done
    linked = finish('<a href="../../reports/README.md">r</a><a href="https://a.b/README.md">b</a>')
    assert linked == '<a href="../../reports/index.html">r</a><a href="https://a.b/README.md">b</a>'
    assert finish('<a href="../../reports/plan.md">p</a>') == '<a href="../../reports/plan.html">p</a>'


def test_every_notebook_has_a_chapter():
    tens = {p.name[0] for p in (ROOT / 'nbs').glob('*.ipynb') if p.name[0].isdigit()}
    assert tens == set(CHAPTERS)
