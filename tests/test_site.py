"The site of `make docs`: built from a small project, its formulas, links and search."
import html
import json
import re
import shutil
from html.parser import HTMLParser

import nbformat
import pytest

from conftest import ROOT
from tools.site import CHAPTERS, Links, dead_links, finish, make
from updetr.core.report import markdown_table

CELLS = {'00_first': ['# First\n\n> one\n\nThe queries $N/M$ and <b>$a_1$</b>; see [the other](01_second.ipynb) and '
                      '[a part of it](01_second.ipynb#here).',
                      '#| default_exp first', '#| export\nprice = "$5 and $6"', '#| hide\nsecret = 1'],
         '01_second': ['# Second\n\n> two\n\n$$\\frac{x}{y}$$\n\n## Here\n\nzirconium']}


EVIL = '<img src=x onerror=alert(1)>'  # a folder, a class, a run: names that others have given
ACTIVE = f'<script>alert(1)</script> {EVIL} [a](javascript:alert(1)) [b]: data:text/html,x'


def hostile_report():
    "An executed notebook whose outputs hold names that would run in a page: one of our tables, and what somebody else's code printed."
    outputs = [nbformat.v4.new_output('stream', text=ACTIVE),
               *(nbformat.v4.new_output('display_data', {'text/plain': ACTIVE} | more)
                 for more in ({'text/markdown': markdown_table([{'class': ACTIVE, ACTIVE: 1}])}, {'text/markdown': ACTIVE},
                              {'text/html': ACTIVE}, {'application/javascript': 'alert(1)'}, {'image/svg+xml': f'<svg>{ACTIVE}</svg>'}))]
    head = nbformat.v4.new_markdown_cell('# Report')
    return nbformat.v4.new_notebook(cells=[head, nbformat.v4.new_code_cell('1', outputs=outputs)])


class Running(HTMLParser):
    "What of a page would run `alert`."
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


def test_the_search_finds_words(site):
    found = json.loads((site / 'search' / 'search_index.json').read_text())['docs']
    assert {d['location'].split('#')[0] for d in found if 'zirconium' in d['text']} == {'nbs/01_second.html'}


def test_nothing_is_fetched_from_the_web(site):
    loaded = re.compile(r'<(?:script|link|img)\b[^>]*?(?:src|href)="(?:https?:)?//')
    assert not [p.name for p in site.rglob('*.html') if loaded.search(p.read_text())]
    assert all((p.parent / re.search(r'src="([^"]*worker.js)"', p.read_text())[1]).exists() for p in (site / 'nbs').glob('*.html'))


def test_the_search_works_without_a_server(site):
    "Typed into the page as it lies on the disk."
    browser = pytest.importorskip('tools.browser', reason='needs playwright: pip install playwright')
    if not browser.CHROMIUM: pytest.skip('needs Chromium: apt install chromium, or name it by the environment variable CHROMIUM')
    with browser.chromium() as chromium:
        page = chromium.new_page(viewport=dict(width=1300, height=900))
        page.set_default_timeout(120_000)
        page.goto((site / 'nbs/00_first.html').as_uri())
        page.locator('.md-search__input').click()
        page.keyboard.type('zirconium', delay=20)
        assert '01_second.html' in page.locator('.md-search-result__link').first.get_attribute('href')


def test_a_dead_link_is_an_error(site, tmp_path):
    assert list(dead_links(site)) == []
    shutil.copytree(site, tmp_path / 'site')
    (tmp_path / 'site' / 'nbs' / '01_second.html').unlink()
    assert 'nbs/00_first.html: 01_second.html' in set(dead_links(tmp_path / 'site'))
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
