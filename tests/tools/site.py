"""The site: every notebook and report as HTML, with a table of contents and a search that needs no server (mkdocs, from wheels only).

python tests/tools/site.py            build _docs/site, then check its links
"""
import html
import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

import mkdocs_jupyter
import nbformat
from latex2mathml.converter import convert
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.plugins import BasePlugin

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as for pytest, when run as a script
from tools.pages import SILENT, definitions, shown, title, words_for_pictures  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
CHAPTERS = {'0': 'Boxes, photos, files', '1': 'Patches and labelled photos', '2': 'The model', '3': 'Training', '4': 'The tasks',
            '5': 'Trained models in use', '6': 'Every table and figure', '7': 'Measured against the published code',
            '8': "The other systems of the paper's tables"}
FOLDERS = {'tutorials': 'Start here', 'guides': 'Guides', 'experiments': "The paper's tables and figures"}
CSS = """
.jp-InputPrompt, .jp-OutputPrompt, .celltoolbar { display: none !important }
@media (min-width: 76em) { .md-grid { max-width: 88rem } }
.jp-RenderedHTMLCommon table { display: block; max-width: 100%; overflow-x: auto }
.jp-OutputArea-output pre, .highlight pre { max-width: 100%; overflow-x: auto }
.jp-RenderedHTMLCommon img, .jp-OutputArea-output img, .md-typeset img { max-width: 100%; height: auto }
math[display="block"] { max-width: 100%; overflow-x: auto }
math { font-family: "STIX Two Math", "Latin Modern Math", "Cambria Math", "DejaVu Math TeX Gyre", math }
.md-typeset pre > code, .highlight pre { font-size: .6rem !important }  /* a line of 100 characters, as below */
@media (min-width: 76.25em) { .jupyter-wrapper .jp-Notebook { --jp-code-font-size: clamp(11.5px, .89vw, 13px) } }
.md-typeset .jupyter-wrapper table :is(th, td), .md-typeset table:not([class]) :is(th, td) { min-width: 0; padding: .45em .8em }
.md-typeset a > code { color: inherit }
.jupyter-wrapper .jp-Notebook { --jp-mirror-editor-comment-color: #367070; --jp-mirror-editor-operator-color: #9400e6;
  --jp-mirror-editor-number-color: #00703c }
"""
# Pictures are drawn in black on white or on nothing: they keep a light ground.
DARK_CSS = """
[data-md-color-scheme="slate"][data-md-color-primary="indigo"] { --md-typeset-a-color: #7aa7f7 }
[data-md-color-scheme="slate"] .md-content img { background: #fff; border-radius: 4px }
[data-md-color-scheme="slate"] .jupyter-wrapper .jp-RenderedHTMLCommon,
[data-md-color-scheme="slate"] .jupyter-wrapper .jp-RenderedText pre { color: var(--md-typeset-color) }
[data-md-color-scheme="slate"] .jupyter-wrapper .jp-Notebook {
  background: none; --jp-mirror-editor-comment-color: #7fb0b0; --jp-mirror-editor-operator-color: #cf8bff;
  --jp-mirror-editor-number-color: #66bb6a; --jp-mirror-editor-meta-color: #cf8bff; --jp-mirror-editor-def-color: #64b5f6 }
[data-md-color-scheme="slate"] .clipboard-copy-icon { color: #aaa !important }
"""
LIGHT, DARK = 'default', 'slate'  # the theme's names
PALETTE = [{'media': f'(prefers-color-scheme: {name})', 'scheme': scheme, 'primary': 'indigo', 'accent': 'indigo',
            'toggle': {'icon': f'material/{icon}', 'name': f'Switch to {other} colours'}}
           for name, scheme, icon, other in (('light', LIGHT, 'weather-night', 'dark'), ('dark', DARK, 'weather-sunny', 'light'))]

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


def collect(root, source):
    "README, notebooks, reports, and the pictures and scripts that they show, in the folder `source`; the table of contents."
    shutil.rmtree(source, ignore_errors=True)
    (source / 'nbs').mkdir(parents=True)
    # without what Jupyter keeps beside an opened notebook
    shutil.copytree(root / 'reports', source / 'reports', ignore=shutil.ignore_patterns('.*'))
    if (root / 'nbs/images').exists(): shutil.copytree(root / 'nbs/images', source / 'nbs/images')
    for name in ('README.md', 'LICENSE'): shutil.copy(root / name, source / {'README.md': 'index.md'}.get(name, name))
    (source / 'site.css').write_text(CSS + DARK_CSS)
    known = definitions(root / 'nbs')
    notebooks = [p for p in sorted((root / 'nbs').glob('*.ipynb')) if p.stem != 'index']
    apart = {name: sorted((root / 'nbs' / name).glob('*.ipynb')) for name in FOLDERS}
    for p in notebooks + sum(apart.values(), []):
        (page := source / p.relative_to(root)).parent.mkdir(exist_ok=True)
        nbformat.write(shown(p, known), page)
    for p in (root / 'nbs/tutorials').glob('*.py'): shutil.copy(p, source / p.relative_to(root))
    executed = sorted(root / p.relative_to(source) for p in (source / 'reports').rglob('*.ipynb'))
    for p in executed:
        of = [Path('../..') / n.relative_to(root) for n in notebooks + apart['experiments'] if n.name == p.name]
        nbformat.write(shown(p, known, report_of=of[0] if of else ''), source / p.relative_to(root))
    return contents(root, notebooks, apart, executed)


def contents(root, notebooks, apart, executed):
    "The navigation: what a newcomer reads, the chapters, the experiments, what came of them."
    place = {p: re.match(r'\d*', p.name)[0] for p in notebooks}
    folders = {FOLDERS[name]: [{title(p): p.relative_to(root).as_posix()} for p in pages] for name, pages in apart.items() if pages}
    last = folders.pop(FOLDERS['experiments'], None)
    nav = [{'updetr': 'index.md'}, *({name: pages} for name, pages in folders.items())]
    if run := [{title(p): f'nbs/{p.name}'} for p in notebooks if not place[p]]: nav.append({'Notebooks to run': run})
    for tens, chapter in CHAPTERS.items():
        mine = [{f'{place[p]} {title(p)}': f'nbs/{p.name}'} for p in notebooks if place[p] and place[p][0] == tens]
        if mine: nav.append({f'{tens}x {chapter}': mine})
    if last: nav.append({FOLDERS['experiments']: last})
    reports = [{'All results': 'reports/README.md'}]
    for p in executed:
        kind = p.parent.name.removeprefix(p.stem).strip('_')
        reports.append({title(p) + (f' ({html.escape(kind)})' if kind else ''): p.relative_to(root).as_posix()})
    return [*nav, {'Reports': reports}]


class Pages(BasePlugin):
    "Takes out of each page what all notebooks' pages share, which is written once, and tells the search what is no text."
    def __init__(self): self.shared = {}

    def on_page_content(self, content, page, **_):
        if not page.file.src_uri.endswith('.ipynb'): return content
        self.shared = {tag: re.findall(rf'<{tag}[^>]*>(.*?)</{tag}>', content, re.S) for tag in ('style', 'script')}
        content = re.sub(r'<(style|script)\b.*?</\1>', '', content, flags=re.S)
        said = iter(words_for_pictures(nbformat.read(page.file.abs_src_path, 4)))
        content = re.sub('(?<=alt=")No description has been provided for this image', lambda _: html.escape(next(said)), content)
        content = re.sub(r'<div class="jp-(Input|Output)Prompt[^>]*>.*?</div>', '', content, flags=re.S)
        return re.sub(r'<(div class="clipboard-copy-txt"|span class="notice")', r'<\1 data-search-exclude="1"', content)

    def write(self, site):
        "The style and the script of all notebooks; in dark colours where the page is dark."
        themes = Path(mkdocs_jupyter.__file__).parent / 'templates/mkdocs_html/assets'
        dark = (themes / 'theme-dark.css').read_text().replace('.jupyter-wrapper', f'[data-md-color-scheme="{DARK}"] .jupyter-wrapper')
        (site / 'notebook.css').write_text('\n'.join([*self.shared.get('style', []), dark]))
        (site / 'notebook.js').write_text('\n'.join(s for s in self.shared.get('script', []) if 'clipboard' in s))


def formula(text, block=False):
    "TeX as MathML."
    text = re.sub(r'\\[lr]Vert(?![a-zA-Z])', '‖', html.unescape(text))  # latex2mathml does not know them after \Big
    return convert(text, display='block' if block else 'inline')


def in_words(text):
    "TeX as a line of text: what a hit of the search shows of a formula."
    between = {'mfrac': ['/'], 'msub': ['_'], 'msup': ['^'], 'msubsup': ['_', '^'],
               'munder': ['_'], 'mover': ['^'], 'munderover': ['_', '^']}

    def words(e):
        parts = [words(child) for child in e]
        marks = between.get(e.tag.rpartition('}')[2])
        if not marks: return (e.text or '').strip() + ''.join(parts)
        parts = [f'({p})' if len(p) > 1 and not p.isalnum() else p for p in parts]
        return parts[0] + ''.join(mark + part for mark, part in zip(marks, parts[1:]))
    return words(ElementTree.fromstring(formula(text)))


def readable_index(docs):
    "Entries of the search with formulas as text, in place."
    for d in docs:
        for key in ('title', 'text'):
            parts = re.split(r'(<pre>.*?</pre>|<code>.*?</code>)', d[key].replace('¶', ''), flags=re.S)
            swap = [p if i % 2 else re.sub(r'(\$\$?)([^$<>]+?)\1', lambda m: html.escape(in_words(m[2])), p) for i, p in enumerate(parts)]
            d[key] = ''.join(swap)


def tame_search(site):
    "The search of the built site: hits in words, and nothing loaded before somebody searches."
    index = site / 'search/search_index.json'
    found = json.loads(index.read_text(encoding='utf-8'))
    readable_index(found['docs'])
    index.write_text(text := json.dumps(found, separators=(',', ':'), ensure_ascii=False), encoding='utf-8')
    (site / 'search/search_index.js').write_text(f'var __index = {text}', encoding='utf-8')
    for bundle in site.glob('assets/javascripts/bundle.*.js'):  # the theme waits only in pages that are opened as files
        code = bundle.read_text(encoding='utf-8')
        bundle.write_text(re.sub(r'location\.protocol!=="file:"(?=\),\w+\("search"\))', '!1', code), encoding='utf-8')


def description(page):
    "Return what a page is about, as search engines and previews show it: its lede, or else the beginning of its text."
    body = page.partition('<article')[2]
    said = re.search(r'<blockquote>\s*<p>(.*?)</p>', body, re.S) or re.search(r'<p>((?!\s*<(?:img|em)).*?)</p>', body, re.S)
    text = ' '.join(re.sub(r'<[^>]*>', '', said[1]).split()) if said else ''
    return html.escape(html.unescape(text)[:300] or 'updetr: UP-DETR to understand, to reproduce and to use')


def finish(page, base='.'):
    "HTML of a page, `base` away from the site's root: links between notebooks lead to pages, formulas and search need nothing of the web."
    about = f'<meta name="description" content="{description(page)}">'
    page = re.sub(r'<title>(.*)</title>', lambda m: f'<title>{html.escape(html.unescape(m[1]))}</title>{about}', page)
    page = re.sub(r'src="https://unpkg\.com/iframe-worker/shim"', f'src="{base}/worker.js"', page)
    page = re.sub(r'(href="(?![a-z]+:)[^"#]*)\.ipynb(["#])', r'\1.html\2', page)
    page = re.sub(r'(href="(?![a-z]+:)(?:[^"#]*/)?)README\.md(["#])', r'\1index.html\2', page)
    page = re.sub(r'(href="(?![a-z]+:)[^"#]*)\.md(["#])', r'\1.html\2', page)
    apart = '|'.join(rf'<{tag}\b.*?</{tag}>' for tag in ('pre', 'code', 'script', 'style', 'svg', 'title'))
    parts = re.split(rf'({apart}|<div class="clipboard-copy-txt".*?</div>|<meta[^>]*>)', page, flags=re.S)
    swap = [p if i % 2 else re.sub(r'(\$\$?)([^$<>\n]+?)\1', lambda m: formula(m[2], m[1] == '$$'), p) for i, p in enumerate(parts)]
    return ''.join(swap)


class Links(HTMLParser):
    "The links of a page, the places it has, and its pictures without words."
    def __init__(self, text):
        super().__init__()
        self.links, self.places, self.unnamed = [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        for key, value in attrs:
            if key in ('href', 'src') and value: self.links.append(value)
            if key in ('id', 'name') and value: self.places.add(value)
        alt = (dict(attrs).get('alt') or '').strip()
        if tag == 'img' and (not alt or alt.startswith('No description')): self.unnamed.append(dict(attrs).get('src', '')[:80])


def faults(site):
    "Links of all pages under `site` that lead to no file or to no place in it, and pictures without words; the web is not followed."
    pages = {p: Links(p.read_text(encoding='utf-8')) for p in site.rglob('*.html')}
    for page, found in pages.items():
        for source in found.unnamed: yield f'{page.relative_to(site)}: picture without a text: {source}'
        for link in found.links:
            path, _, place = unquote(link).partition('#')
            if re.match(r'[a-z][a-z+.-]*:|//', link) or page.name == '404.html': continue
            target = (page.parent / path).resolve() if path else page
            if target.is_dir(): target /= 'index.html'
            if not target.exists() or (place and target in pages and place not in pages[target].places):
                yield f'{page.relative_to(site)}: {link}'


def make(root=ROOT, out=ROOT / '_docs'):
    "Build the site of the project `root` in `out`/site. Raises ValueError for dead links and pictures without words."
    source, site = out / 'source', out / 'site'
    notebooks = {'include': ['*.ipynb'], 'ignore_h1_titles': True, 'include_source': False, 'cache_dir': str(out / 'cache'),
                 'remove_tag_config': {'remove_input_tags': [SILENT]}}
    settings = dict(
        site_name='updetr', docs_dir='source', site_dir='site', nav=collect(root, source), use_directory_urls=False,
        extra_css=['notebook.css', 'site.css'], extra_javascript=['notebook.js'],
        theme={'name': 'material', 'font': False, 'palette': PALETTE,
               'features': ['navigation.top', 'navigation.footer', 'toc.follow']},
        plugins=['search', 'offline', {'mkdocs-jupyter': notebooks}],
        markdown_extensions=['tables', 'fenced_code', 'attr_list', 'md_in_html', {'toc': {'permalink': True}}])
    (out / 'mkdocs.yml').write_text(json.dumps(settings))  # JSON is YAML
    config = load_config(str(out / 'mkdocs.yml'))
    config.plugins['pages'] = pages = Pages()
    build(config)
    pages.write(site)
    (site / 'worker.js').write_text(WORKER)
    tame_search(site)
    for page in site.rglob('*.html'):
        base = '../' * (len(page.relative_to(site).parts) - 1) + '.'
        page.write_text(finish(page.read_text(encoding='utf-8'), base), encoding='utf-8')
    if found := sorted(faults(site)): raise ValueError(f'{len(found)} dead links or pictures without words:\n' + '\n'.join(found))
    print(f'{len(list(site.rglob("*.html")))} pages, no dead link, no picture without words: {site / "index.html"}')


if __name__ == '__main__': make()
