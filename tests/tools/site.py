"""The site: every notebook and report as HTML, with a table of contents and a search that needs no server (mkdocs, from wheels only).

python tests/tools/site.py            build _docs/site, then check its links
"""
import html
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import nbformat
from latex2mathml.converter import convert
from mkdocs.commands.build import build
from mkdocs.config import load_config

ROOT = Path(__file__).resolve().parents[2]
CHAPTERS = {'0': 'Boxes, photos, files', '1': 'Patches and labelled photos', '2': 'The model', '3': 'Training', '4': 'The tasks',
            '5': 'Trained models in use', '6': 'Every table and figure', '7': 'Measured against the published code'}
CSS = """
.jp-InputPrompt, .jp-OutputPrompt { display: none !important }
@media (min-width: 76em) { .md-grid { max-width: 88rem } }
.jp-RenderedHTMLCommon table { display: block; max-width: 100%; overflow-x: auto }
.jp-OutputArea-output pre, .highlight pre { max-width: 100%; overflow-x: auto }
.jp-RenderedHTMLCommon img, .jp-OutputArea-output img, .md-typeset img { max-width: 100%; height: auto }
math[display="block"] { max-width: 100%; overflow-x: auto }
math { font-family: "STIX Two Math", "Latin Modern Math", "Cambria Math", "DejaVu Math TeX Gyre", math }
.highlight pre { font-size: .6rem !important }  /* a line of 100 characters */
"""

# The search runs in a worker, which browsers refuse to pages that are opened as files. There it runs in a hidden frame instead,
# with code of our own: the theme would fetch some from the web.
WORKER = """
if (location.protocol === 'file:') window.Worker = class extends EventTarget {
  constructor(url) {
    super();
    const frame = document.createElement('iframe');
    frame.hidden = true;
    document.body.append(frame);
    this.inside = frame.contentWindow;
    this.inside.postMessage = data => this.dispatchEvent(new MessageEvent('message', {data}));
    const script = this.inside.document.createElement('script');
    script.src = url;
    this.ready = new Promise(done => { script.onload = done; });
    this.inside.document.body.append(script);
  }
  postMessage(data) { this.ready.then(() => this.inside.dispatchEvent(new MessageEvent('message', {data}))); }
};
"""


SHOWN = {'text/plain', 'text/markdown', 'image/png', 'image/jpeg'}  # kinds of output; none that a page would run


def harmless(output):
    "The output without what a page would run: names of classes, files and runs are others' words, and a report may be of any data."
    if 'data' not in output: return output
    output.data = {kind: content for kind, content in output.data.items() if kind in SHOWN}
    if 'text/markdown' in output.data:
        text = re.sub(r'<(?=[a-zA-Z/!?])', '&lt;', output.data['text/markdown'])
        output.data['text/markdown'] = re.sub(r'\](?=(\(|:)\s*(javascript|vbscript|data):)', '&#93;', text, flags=re.I)
    return output


def shown(path):
    "The notebook at `path` as a reader wants it: no hidden cells, no directives, silent inputs empty, outputs that do nothing."
    nb = nbformat.read(path, 4)
    nb.cells = [c for c in nb.cells if not re.search(r'^#\|\s*(hide|default_exp)\b', c.source, re.M)]
    for cell in nb.cells:
        if cell.cell_type != 'code': continue
        silent = re.search(r'^#\|\s*echo:\s*false', cell.source, re.M)
        cell.source = '' if silent else re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M)
        cell.outputs = [harmless(o) for o in cell.outputs]
    return nb


def title(path):
    "The first heading of a notebook."
    return re.search(r'^#\s+(.+)$', '\n'.join(c.source for c in nbformat.read(path, 4).cells if c.cell_type == 'markdown'), re.M)[1]


def collect(root, source):
    "README, notebooks, reports, and the pictures and scripts that they show, in the folder `source`; the table of contents."
    shutil.rmtree(source, ignore_errors=True)
    (source / 'nbs').mkdir(parents=True)
    shutil.copytree(root / 'reports', source / 'reports')
    if (root / 'nbs/images').exists(): shutil.copytree(root / 'nbs/images', source / 'nbs/images')
    for name in ('README.md', 'LICENSE'): shutil.copy(root / name, source / {'README.md': 'index.md'}.get(name, name))
    (source / 'site.css').write_text(CSS)
    notebooks = [p for p in sorted((root / 'nbs').glob('*.ipynb')) if p.stem != 'index']
    apart = {name: sorted((root / 'nbs' / name).glob('*.ipynb')) for name in ('tutorials', 'experiments', 'guides')}
    for p in notebooks + sum(apart.values(), []):
        (page := source / p.relative_to(root)).parent.mkdir(exist_ok=True)
        nbformat.write(shown(p), page)
    for p in (root / 'nbs/tutorials').glob('*.py'): shutil.copy(p, source / p.relative_to(root))
    for p in (source / 'reports').rglob('*.ipynb'): nbformat.write(shown(p), p)
    place = {p: re.match(r'\d*', p.name)[0] for p in notebooks}
    nav = [{'updetr': 'index.md'}, {'To be run': [{title(p): f'nbs/{p.name}'} for p in notebooks if not place[p]]}]
    nav += [{name.capitalize(): [{title(p): f'nbs/{name}/{p.name}'} for p in pages]} for name, pages in apart.items() if pages]
    for tens, chapter in CHAPTERS.items():
        mine = [{f'{place[p]} {title(p)}': f'nbs/{p.name}'} for p in notebooks if place[p] and place[p][0] == tens]
        if mine: nav.append({chapter: mine})
    executed = sorted(p.relative_to(source).as_posix() for p in (source / 'reports').rglob('*.ipynb'))
    return [*nav, {'Reports': ['reports/README.md', *({html.escape(Path(p).parent.name): p} for p in executed)]}]


def finish(page, base='.'):
    "HTML of a page, `base` away from the site's root: links between notebooks lead to pages, formulas and search need nothing of the web."
    def formula(m):
        text = re.sub(r'\\[lr]Vert(?![a-zA-Z])', '‖', html.unescape(m[2]))  # latex2mathml does not know them after \Big
        return convert(text, display='block' if m[1] == '$$' else 'inline')
    page = re.sub(r'(?<=<title>).*(?=</title>)', lambda m: html.escape(html.unescape(m[0])), page)
    page = re.sub(r'src="https://unpkg\.com/iframe-worker/shim"', f'src="{base}/worker.js"', page)
    page = re.sub(r'(href="(?![a-z]+:)[^"#]*)\.ipynb(["#])', r'\1.html\2', page)
    page = re.sub(r'(href="(?![a-z]+:)(?:[^"#]*/)?)README\.md(["#])', r'\1index.html\2', page)
    page = re.sub(r'(href="(?![a-z]+:)[^"#]*)\.md(["#])', r'\1.html\2', page)
    apart = '|'.join(rf'<{tag}\b.*?</{tag}>' for tag in ('pre', 'code', 'script', 'style', 'svg'))
    parts = re.split(rf'({apart}|<div class="clipboard-copy-txt".*?</div>)', page, flags=re.S)
    return ''.join(p if i % 2 else re.sub(r'(\$\$?)([^$<>\n]+?)\1', formula, p) for i, p in enumerate(parts))


class Links(HTMLParser):
    "What a page links to, and the places it has."
    def __init__(self, text):
        super().__init__()
        self.links, self.places = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        for key, value in attrs:
            if key in ('href', 'src') and value: self.links.append(value)
            if key in ('id', 'name') and value: self.places.add(value)


def dead_links(site):
    "Links of all pages under `site` that lead to no file, or to no place in it; addresses of the web are not followed."
    pages = {p: Links(p.read_text(encoding='utf-8')) for p in site.rglob('*.html')}
    for page, found in pages.items():
        for link in found.links:
            path, _, place = unquote(link).partition('#')
            if re.match(r'[a-z][a-z+.-]*:|//', link) or page.name == '404.html': continue
            target = (page.parent / path).resolve() if path else page
            if target.is_dir(): target /= 'index.html'
            if not target.exists() or (place and target in pages and place not in pages[target].places):
                yield f'{page.relative_to(site)}: {link}'


def make(root=ROOT, out=ROOT / '_docs'):
    "Build the site of the project `root` in `out`/site. Raises ValueError for dead links."
    source, site = out / 'source', out / 'site'
    settings = dict(
        site_name='updetr', docs_dir='source', site_dir='site', nav=collect(root, source), use_directory_urls=False,
        extra_css=['site.css'],
        theme={'name': 'material', 'font': False, 'features': ['navigation.top', 'navigation.footer', 'search.highlight', 'toc.follow']},
        plugins=['search', 'offline', {'mkdocs-jupyter': {'include': ['*.ipynb'], 'ignore_h1_titles': True, 'include_source': False}}],
        markdown_extensions=['tables', 'fenced_code', 'attr_list', 'md_in_html', {'toc': {'permalink': True}}])
    (out / 'mkdocs.yml').write_text(json.dumps(settings))  # JSON is YAML
    build(load_config(str(out / 'mkdocs.yml')))
    (site / 'worker.js').write_text(WORKER)
    for page in site.rglob('*.html'):
        base = '../' * (len(page.relative_to(site).parts) - 1) + '.'
        page.write_text(finish(page.read_text(encoding='utf-8'), base), encoding='utf-8')
    if dead := sorted(dead_links(site)): raise ValueError(f'{len(dead)} dead links:\n' + '\n'.join(dead))
    print(f'{len(list(site.rglob("*.html")))} pages, no dead link: {site / "index.html"}')


if __name__ == '__main__': make()
