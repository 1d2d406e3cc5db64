"`nbs/localize.ipynb` in real programs and a real browser: drags, keys, uploads, as a person does them; screenshots in tests/artifacts."
import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
import time
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image

from updetr.core.checkpoint import save_checkpoint
from updetr.core.config import make_config, model_options
from updetr.core.photos import builtin_photos
from updetr.model.updetr import build_updetr
from updetr.predict.localizer import QueryPatchLocalizer
from updetr.tasks.oneshot import build_oneshot, oneshot_config

playwright = pytest.importorskip('playwright.sync_api', reason='the browser tests need playwright: pip install playwright')
from tools.browser import CHROMIUM, FRONTS, PALE, PHONE, ROOT, Hand, chromium, opened, prepare, run  # noqa: E402 (needs playwright)

pytestmark = pytest.mark.skipif(not CHROMIUM, reason='the browser tests need Chromium: apt install chromium fonts-dejavu, or name it by '
                                                     'the environment variable CHROMIUM')
playwright.expect.set_options(timeout=120_000)  # a state is waited for, however busy the machine
PATHS = {p.name: p.path for p in builtin_photos()}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "The notebook with two small random models, and a last cell that writes down what the kernel knows."
    here = tmp_path_factory.mktemp('lab')
    small = dict(backbone='resnet18', weights='none', features='layer2', hidden_dim=32, nheads=4, dim_feedforward=32, dec_layers=2,
                 num_queries=12)
    pre, one = make_config('demo', **small, num_patches=4, patch_size=32, view_size=96), oneshot_config('demo', **small, query_size=32)
    torch.manual_seed(0)
    for name, cfg, build in (('pre', pre, build_updetr), ('one', one, build_oneshot)):
        model = build(**model_options(cfg))
        torch.nn.init.normal_(model.query_embed.weight)  # random weights answer always the same; these can be told apart
        model.bbox_embed.layers[-1].weight.data *= 20
        save_checkpoint(here / f'{name}.pth', {'model': model.state_dict(), 'args': dataclasses.asdict(cfg)})
    prepare(here, 'pre.pth', 'one.pth')
    Image.open(PATHS['coffee']).resize((900, 600)).save(here / 'mine.jpg')
    (here / 'bad.jpg').write_bytes(b'this is not a photo')
    noise = np.random.default_rng(0).integers(0, 256, (1500, 2700, 3), np.uint8)
    Image.fromarray(noise).save(here / 'large.png', compress_level=0)
    assert (here / 'large.png').stat().st_size > 11 << 20, 'more than a message may have'
    heic = b'\0\0\0\x18ftypheic' + bytes(99)
    (here / 'small.heic').write_bytes(heic)
    (here / 'large.heic').write_bytes(heic + bytes(11 << 20))
    (here / 'drawing.svg').write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    return here


@pytest.fixture(scope='module')
def browser():
    "One Chromium for all tests."
    with chromium() as browser: yield browser


def installed(front):
    "The program's name; skips where it is not installed (JupyterLab is, everywhere)."
    if not find_spec(front): pytest.skip(f'every test of the widget in {front} needs it: pip install {front}')
    return front


@pytest.fixture(scope='module', params=FRONTS)
def front(request):
    "The programs that show the notebook, one after the other."
    return installed(request.param)


@pytest.fixture(scope='module')
def lab(front, browser, folder, tmp_path_factory):
    "The notebook in one of the programs."
    with opened(browser, front, folder, tmp_path_factory.mktemp('jupyter')) as page: yield page


@pytest.fixture
def hand(lab, folder):
    "The photo of the start, one known box, nothing switched on."
    hand = Hand(lab, folder)
    hand.choose('photo', 'chelsea')
    hand.choose('find it in', 'the same photo')
    hand.button('clear').click()
    hand.wait(lambda s: s['photo'] == 'chelsea' and s['target'] == 'the same photo' and s['boxes'] == [])
    hand.box(40, 50, 140, 150)
    hand.settle()
    return hand


def test_the_widget_is_on_the_first_screen(lab, folder):
    hand = Hand(lab, folder)
    hand.shot('1_first_screen')
    r = hand.photo().bounding_box()
    assert r['y'] > 0 and r['y'] + r['height'] < 1000 and 250 < r['width'] <= 620
    assert abs(r['width'] / r['height'] - 451 / 300) < .02
    assert lab.locator('[data-mime-type="application/vnd.jupyter.error"]').count() == 0
    assert hand.drawn() == hand.state()['boxes'] == [[135, 90, 316, 210]] and len(hand.answers()) == 1


def test_drag(hand, folder):
    before = hand.state()['sent']
    state = hand.box(120, 80, 260, 200)
    assert hand.drawn() == [[120, 80, 260, 200]] and state['sent'] == before + 1, 'one message for one drag'
    found = QueryPatchLocalizer.from_checkpoint(folder / 'pre.pth')(PATHS['chelsea'], [[120, 80, 260, 200]], likeness=True)
    assert torch.allclose(torch.tensor(state['marks'][0]['box']), found.boxes[0], atol=.1)
    hand.page.wait_for_function('t => [...document.querySelectorAll(".labels text")].some(e => e.textContent === t)',
                                arg=f'1: alike {found.likeness[0]:.2f}')
    where = f'likeness {found.likeness[0]:.2f}, score {found.scores[0]:.2f}, IoU'
    assert where in state['text'] and 'confiden' not in hand.page.inner_text('body')
    hand.shot('2_drag')


def test_drag_backwards_and_out_of_the_photo(hand):
    sent, seen = hand.state()['sent'], []
    hand.drag(260, 200, -30, -20, during=lambda: seen.extend([hand.drawn(), hand.state()['sent']]))
    assert seen == [[[0, 0, 260, 200]], sent], 'drawn by the browser alone while it is dragged'
    hand.wait(lambda s: s['boxes'] == [[0, 0, 260, 200]])
    hand.drag(300, 200, 900, 150)
    hand.wait(lambda s: s['boxes'] == [[300, 150, 451, 200]])
    assert hand.drawn() == [[300, 150, 451, 200]]


def test_a_click_draws_nothing(hand):
    sent = hand.state()['sent']
    hand.drag(200, 200, 201, 202)
    hand.settle()
    assert hand.drawn() == [[40, 50, 140, 150]] and hand.state()['sent'] == sent


def test_two_patches_moved_and_resized(hand):
    hand.page.keyboard.down('Shift')
    hand.drag(200, 100, 320, 220)
    hand.page.keyboard.up('Shift')
    state = hand.wait(lambda s: len(s['boxes']) == 2 and len(s['marks']) == 2)
    assert state['boxes'] == [[40, 50, 140, 150], [200, 100, 320, 220]] and {m['patch'] for m in state['marks']} == {0, 1}
    lines = hand.photo().locator('.queries .line:not(.light)').all()
    assert len({e.get_attribute('stroke') for e in lines}) == 2
    hand.drag(260, 100, 280, 120)  # by the upper border
    hand.wait(lambda s: s['boxes'][1:] == [[220, 120, 340, 240]])
    hand.drag(140, 150, 160, 130)  # by the lower right corner
    hand.wait(lambda s: s['boxes'] == [[40, 50, 160, 130], [220, 120, 340, 240]])
    hand.shot('3_two_patches')


def test_keyboard(hand):
    cells = hand.page.locator('.jp-Cell').count()
    box = hand.photo().locator('[data-box="0"]')
    box.focus()
    step = 5  # a hundredth of 451 px
    box.press('ArrowRight'), box.press('ArrowUp')
    hand.wait(lambda s: s['boxes'] == [[40 + step, 50 - step, 140 + step, 150 - step]])
    box.press('Shift+ArrowDown'), box.press('Shift+ArrowLeft')
    hand.wait(lambda s: s['boxes'] == [[40 + step, 50 - step, 140, 150]])
    slider = hand.control('.widget-hslider', 'x')
    playwright.expect(slider.locator('.widget-readout')).to_have_text(re.compile(f'^{40 + step}\\D+140$'))  # it follows the box
    slider.locator('.noUi-handle').first.press('ArrowRight')
    hand.wait(lambda s: s['boxes'] == [[41 + step, 50 - step, 140, 150]])
    targets = hand.control('.widget-dropdown', 'find it in').locator('select')
    targets.press('ArrowDown')
    target = hand.wait(lambda s: s['target'] != 'the same photo')['target']
    assert targets.locator('option:checked').inner_text() == target
    targets.press('ArrowUp')
    hand.wait(lambda s: s['target'] == 'the same photo' and len(s['marks']) == 1)
    box.focus()
    box.press('Delete')
    state = hand.wait(lambda s: s['boxes'] == [])
    assert 'Drag a box' in state['text'] and state['marks'] == []
    assert hand.page.locator('.jp-Cell').count() == cells, 'no key of the box reached the notebook'


def test_another_target_photo(hand):
    hand.choose('find it in', 'coffee')
    state = hand.wait(lambda s: s['target'] == 'coffee' and len(s['other']) == 1)
    assert state['marks'] == [] and 'IoU' not in state['text']
    hand.page.wait_for_function('document.querySelectorAll(".updetr-photo")[1]?.querySelector(".labels text")')
    assert hand.answers(0) == [] and hand.photo(1).is_visible() and hand.photo(1).get_attribute('viewBox') == '0 0 600 400'
    hand.shot('4_target')
    hand.choose('find it in', 'the same photo')
    hand.wait(lambda s: len(s['marks']) == 1)
    hand.photo(1).wait_for(state='hidden')


def test_uploads(hand):
    hand.upload('bad.jpg', 'another photo')
    hand.wait(lambda s: 'bad.jpg: broken image' in s['text'])
    hand.shot('5_bad_upload')
    hand.box(60, 60, 200, 160)
    hand.upload('mine.jpg', 'another photo')
    hand.wait(lambda s: s['photo'] == 'mine.jpg' and len(s['marks']) == 1)
    hand.page.wait_for_function('document.querySelector(".updetr-photo").getAttribute("viewBox") === "0 0 900 600"')
    hand.box(100, 100, 700, 500)
    hand.shot('6_upload')
    hand.upload('mine.jpg', 'another target')
    hand.wait(lambda s: s['target'] == 'mine.jpg' and len(s['other']) == 1)


def test_threshold_and_all_answers(hand):
    handle = hand.control('.widget-hslider', 'threshold').locator('.noUi-handle')
    handle.press('End')
    state = hand.wait(lambda s: s['threshold'] == 1)
    hand.wait(lambda s: s['marks'] == [] and 'No answer has a score of 1.00' in s['text'])
    hand.page.wait_for_function('!document.querySelector(".updetr-photo .labels text")')
    handle.press('Home')
    hand.wait(lambda s: s['threshold'] == 0 and len(s['marks']) == 1)
    hand.button('all answers').click()
    state = hand.wait(lambda s: len(s['marks']) > 1)
    assert len(state['marks']) <= 3, 'a group of 12 / 4 object queries'
    hand.shot('7_all_answers')
    hand.button('best of each patch').click()
    hand.wait(lambda s: len(s['marks']) == 1)


def test_attention_changes_and_weights(hand):
    hand.photo().locator('.labels text').first.click()
    hand.wait(lambda s: s['heat'] > 0)
    hand.page.wait_for_selector('.updetr-photo >> nth=0 >> image.heat[visibility=visible]')
    hand.shot('8_attention')
    hand.photo().locator('.labels text').first.click()
    hand.wait(lambda s: s['heat'] == 0)
    first = hand.state()['text']
    for change in ('jitter', 'blur', 'grey', 'flip', 'scale'): hand.button(change).click()
    hand.wait(lambda s: s['text'] != first)
    hand.shot('9_changed')
    for change in ('jitter', 'blur', 'grey', 'flip', 'scale'): hand.button(change).click()
    for weights in ('one-shot', 'untrained', 'pre-trained'):
        hand.button(weights).click()
        hand.wait(lambda s, w=weights: s['weights'] == w and 'found' in s['text'] and ('learnt nothing' in s['text']) == (w == 'untrained'))


def test_a_click_keeps_all_patches(hand):
    "Also a click that moves by a pixel, while a patch has the focus; and a drag that is given up with escape, or loses the focus."
    hand.python('widget.c.canvas.boxes = [[40, 50, 140, 150], [200, 100, 320, 220]]')
    sent = hand.wait(lambda s: len(s['marks']) == 2)['sent']
    hand.photo().locator('[data-box="1"]').focus()
    hand.drag(250, 280, 251, 280)
    assert len(hand.drawn()) == 2 and hand.focus() == '1'
    hand.drag(250, 280, 350, 240, during=lambda: hand.page.keyboard.press('Escape'))
    assert len(hand.drawn()) == 2 and hand.focus() == '1'
    hand.settle()
    assert hand.state()['sent'] == sent
    seen = []
    blur = 'document.querySelector(".updetr-photo [data-box]").dispatchEvent(new FocusEvent("focusout", {bubbles: true}))'
    hand.drag(250, 280, 350, 240, during=lambda: (hand.page.evaluate(blur), seen.append(hand.state()['sent'])))
    assert seen == [sent] and hand.wait(lambda s: s['boxes'] == [[250, 240, 350, 280]])['sent'] == sent + 1


def test_a_second_finger_is_ignored(hand):
    touch = """p => { const svg = document.querySelector('.updetr-photo'), r = svg.getBoundingClientRect();
      for (const type of ['pointerdown', 'pointermove', 'pointerup'])
        try { svg.dispatchEvent(new PointerEvent(type, {pointerId: 77, bubbles: true, clientX: r.x + 9, clientY: r.y + 9})); } catch {} }"""
    hand.drag(200, 100, 300, 200, during=lambda: hand.page.evaluate(touch))
    hand.wait(lambda s: s['boxes'] == [[200, 100, 300, 200]])


def test_the_focus_stays_on_a_patch(hand):
    "After a click on an answer arrows move the patch; after a deletion the next patch has the focus; never does a heading fold."
    cells = hand.page.locator('.jp-Cell').count()
    hand.python('widget.c.canvas.boxes = [[40, 50, 140, 150], [200, 100, 320, 220]]')
    hand.wait(lambda s: len(s['marks']) == 2)
    mark = hand.state()['marks'][0]
    hand.photo().locator('[data-mark="0"]').click()
    hand.wait(lambda s: s['heat'] > 0)
    assert hand.focus() == str(mark['patch'])
    hand.page.keyboard.press('ArrowLeft'), hand.page.keyboard.press('ArrowLeft')
    x = (40, 200)[mark['patch']] - 10
    hand.wait(lambda s: s['boxes'][mark['patch']][0] == x)
    hand.photo().locator('[data-box="1"]').focus()
    hand.page.keyboard.press('Delete')
    hand.wait(lambda s: len(s['boxes']) == 1 and len(s['marks']) == 1)
    assert hand.focus() == '0'
    hand.page.keyboard.press('Delete')
    hand.wait(lambda s: s['boxes'] == [])
    for _ in range(3): hand.page.keyboard.press('ArrowLeft')
    assert hand.page.locator('.jp-collapseHeadingButton.jp-mod-collapsed, .jp-MarkdownHeadingCollapsed').count() == 0
    assert hand.photo().is_visible() and hand.page.locator('.jp-Cell').count() == cells


def test_large_photos_and_other_kinds(hand):
    "A photo over the websocket's limit is made smaller by the browser, and the button lives on; HEIC and SVG are named, large or small."
    hand.upload('large.png', 'another photo')
    hand.wait(lambda s: s['photo'] == 'large.png' and len(s['marks']) == 1)
    hand.page.wait_for_function('document.querySelector(".updetr-photo").getAttribute("viewBox") === "0 0 1280 711"')
    for name, word in (('large.heic', 'a HEIC photo'), ('small.heic', 'a HEIC photo'), ('drawing.svg', 'an SVG drawing')):
        hand.upload(name, 'another photo')
        hand.wait(lambda s, name=name, word=word: f'{name}: {word}' in s['text'])
    hand.upload('mine.jpg', 'another photo')
    hand.wait(lambda s: s['photo'] == 'mine.jpg' and len(s['marks']) == 1)


def test_labels_can_be_read_and_touched(hand):
    "Above the lines, on a solid ground, with a contrast of 4.5 at least; what is touched is 24 px wide."
    hand.python('widget.c.canvas.boxes = [[40 * i + 5, 20 * i + 5, 40 * i + 60, 20 * i + 60] for i in range(10)]')
    hand.wait(lambda s: len(s['marks']) == 10)
    hand.page.wait_for_function('document.querySelectorAll(".updetr-photo")[0].querySelectorAll("[data-mark]").length === 10')
    order = [g.get_attribute('class') for g in hand.photo().locator('> g').all()]
    assert order.index('labels') > max(order.index('queries'), order.index('answers'))

    def light(color):
        "Relative luminance of rrggbb or rgb, as in WCAG 2"
        digits = color if len(color) == 6 else ''.join(2 * c for c in color)
        values = np.array([int(digits[i:i + 2], 16) / 255 for i in (0, 2, 4)])
        return np.where(values <= .03928, values / 12.92, ((values + .055) / 1.055) ** 2.4) @ [.2126, .7152, .0722]
    for g in hand.photo().locator('[data-mark]').all():
        ground, text = (light(g.locator(k).get_attribute('fill')[1:]) for k in ('rect', 'text'))
        assert (max(ground, text) + .05) / (min(ground, text) + .05) > 4.5
        assert g.bounding_box()['height'] >= 23.9
    hit = hand.photo().locator('[data-corner]').first.bounding_box()
    touch = hand.page.context.new_cdp_session(hand.page)
    touch.send('Emulation.setTouchEmulationEnabled', {'enabled': True})  # a finger points, no mouse
    grip = hand.photo().locator('.grip').first.evaluate('e => parseFloat(getComputedStyle(e).strokeWidth)')
    touch.send('Emulation.setTouchEmulationEnabled', {'enabled': False})
    assert min(hit['width'], hit['height'], grip) >= 23.9
    hand.page.get_by_label('several patches').check()
    hand.drag(20, 250, 90, 290)
    playwright.expect(hand.page.locator('.updetr-state').first).to_contain_text('10 patches at once')
    assert len(hand.drawn()) == 10
    hand.shot('10_ten_patches')
    hand.page.get_by_label('several patches').uncheck()
    for _ in range(2): hand.button('remove patch').click()
    hand.wait(lambda s: len(s['boxes']) == 8)


def test_a_dark_theme_can_be_read(hand, lab, front):
    "Labels, controls, messages and errors have a contrast of 4.5 to their ground, in JupyterLab's light and dark theme."
    if front == 'voila': pytest.skip('Voilà has no menu of themes')
    root, trouble = lab.locator('.updetr-widget'), 'ValueError: not a photo'
    hand.python(f'from updetr.predict.widget import _say; _say(widget.c, {trouble!r}, bad=True)')
    playwright.expect(root).to_contain_text(trouble)
    for theme in ('JupyterLab Dark', 'JupyterLab Light'):
        lab.evaluate("theme => window.jupyterapp.commands.execute('apputils:change-theme', {theme})", theme)
        lab.wait_for_function('theme => document.body.dataset.jpThemeName === theme', arg=theme)
        assert root.evaluate(PALE) == []
        hand.shot(f'14_{theme[-5:].strip()}_{front}')


def test_names_and_words_for_those_who_cannot_see(hand):
    "The message is announced, handles and strip have names, tooltips are words; nothing is left of the strip when all is cleared."
    root = hand.page.locator('.updetr-widget')
    assert root.locator('.updetr-message[role=status]').count() == 1
    names = root.locator('.noUi-handle').evaluate_all('all => all.map(e => e.getAttribute("aria-label"))')
    assert names == ['x from', 'x to', 'y from', 'y to', 'threshold']
    assert root.locator(':is(button, select, input, [tabindex]):not([data-lm-suppress-shortcuts])').count() == 0
    assert root.locator('.updetr-strip img').get_attribute('alt').startswith('1 query patch')
    hand.python('late = type(widget.c.threshold)(description="late"); settings = widget.root.children[1]; settings.children += (late,)')
    playwright.expect(root.locator('[data-lm-suppress-shortcuts][aria-label=late]')).to_have_count(1)
    hand.python('settings.children = settings.children[:-1]')
    titles = root.locator('[title]').evaluate_all('all => all.map(e => e.title).filter(t => t)')
    assert len(titles) > 15 and not any(re.search('[{}=]', t) for t in titles), titles
    hand.button('clear').click()
    hand.wait(lambda s: s['boxes'] == [])
    playwright.expect(root.locator('img')).to_have_count(0)


def test_controls_stand_beside_the_photo(hand):
    left, right = hand.photo().bounding_box(), hand.page.locator('.updetr-widget .widget-toggle-buttons').first.bounding_box()
    assert right['x'] >= left['x'] + left['width'] and abs(right['y'] - left['y']) < 40


# what can be touched and read, with its place, and whether its text is cut off; how many px of a slider's handle answer to a finger
CONTROLS = """root => [...root.querySelectorAll('button, select, svg, img, .noUi-target, .widget-readout, .widget-label')]
  .filter(e => e.getClientRects().length).map(e => {
    const r = e.getBoundingClientRect(), cut = e.clientWidth && e.matches('button, .widget-readout, .widget-label');
    return {what: e.outerHTML.slice(0, 80), button: e.matches('button, select'), left: r.left, right: r.right, height: r.height,
            cut: cut && e.scrollWidth > e.clientWidth + 1};
  })"""
HANDLES = """root => [...root.querySelectorAll('.noUi-handle')].map(e => {
  e.scrollIntoView({block: 'center'});
  const r = e.getBoundingClientRect(), at = k => document.elementFromPoint(r.left + r.width / 2, r.top + r.height / 2 + k);
  return [...Array(99).keys()].filter(k => at(k - 49) === e).length;
})"""


def check_fits_a_phone(hand):
    "All within the widget's width, no word cut off, 44 px high for a finger."
    root = hand.page.locator('.updetr-widget')
    left, width = (root.bounding_box()[k] for k in ('x', 'width'))
    controls = root.evaluate(CONTROLS)
    assert len(controls) > 30
    for c in controls:
        assert left - 1 <= c['left'] and c['right'] <= left + width + 1 and not c['cut'], c
        assert not c['button'] or c['height'] >= 44, c
    assert min(root.evaluate(HANDLES)) >= 43


def test_controls_fit_a_phone(hand):
    "In 340 px, with a finger; a mouse has 24 px of a slider's handle."
    assert min(hand.page.locator('.updetr-widget').evaluate(HANDLES)) >= 23
    narrow = hand.page.add_style_tag(content='.updetr-widget {width: 340px !important}')
    touch = hand.page.context.new_cdp_session(hand.page)
    try:
        touch.send('Emulation.setTouchEmulationEnabled', {'enabled': True})
        hand.page.wait_for_function('matchMedia("(pointer: coarse)").matches')
        check_fits_a_phone(hand)
    finally:
        touch.send('Emulation.setTouchEmulationEnabled', {'enabled': False})
        narrow.evaluate('e => e.remove()')


def test_a_phone(browser, folder, tmp_path):
    "Voilà on 390 px: nothing to scroll sideways; a finger draws, adds, asks where it looked, and removes."
    with opened(browser, installed('voila'), folder, tmp_path, PHONE) as page:
        hand = Hand(page, folder)
        assert page.evaluate('[...document.querySelectorAll("*")].every(e => e.scrollLeft === 0 && (e !== document.documentElement || '
                             'e.scrollWidth <= innerWidth))')
        check_fits_a_phone(hand)
        hand.touch(100, 60, 240, 200)
        near = hand.wait(lambda s: s['boxes'] != [[135, 90, 316, 210]] and len(s['marks']) == 1)['boxes']
        assert np.abs(np.array(near) - [100, 60, 240, 200]).max() <= 2
        page.get_by_label('several patches').tap()
        hand.touch(300, 150, 400, 250)
        hand.wait(lambda s: len(s['boxes']) == 2 and len(s['marks']) == 2)
        hand.shot('12_phone')
        hand.photo().locator('[data-mark]').first.tap()
        hand.wait(lambda s: s['heat'] > 0)
        for left in (1, 0):
            hand.button('remove patch').tap()
            hand.wait(lambda s, left=left: len(s['boxes']) == left)
        hand.button('remove patch').scroll_into_view_if_needed()
        hand.shot('13_phone_controls')


def test_a_kernel_that_works_or_is_gone_is_seen(hand, lab, front, folder):
    "Working, restarted, killed: each is said, and answers of a kernel that is gone are faded."
    note = lab.locator('.updetr-state').first
    kernel = hand.state()['pid']
    os.kill(kernel, signal.SIGSTOP)  # a busy cell would not do: JupyterLab's kernels answer widgets beside it
    try:
        hand.drag(200, 160, 320, 260)
        playwright.expect(note).to_have_text(re.compile('working|does not answer'))
    finally: os.kill(kernel, signal.SIGCONT)
    hand.wait(lambda s: s['boxes'] == [[200, 160, 320, 260]])
    playwright.expect(note).to_have_text('')
    if front != 'voila':  # which has no button for it
        lab.evaluate('window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart()')
        playwright.expect(note).to_contain_text('was restarted')
        assert faded(hand)
        hand.shot(f'11_restarted_{front}')
        run(lab, front, folder)
        playwright.expect(lab.locator('.updetr-old')).to_have_count(0)
        hand.box(120, 80, 260, 200)
    os.kill(hand.state()['pid'], signal.SIGKILL)
    if front != 'voila': lab.locator('.jp-Dialog button').click()  # these two say so, too
    for _ in hand.tries('the widget to see that its kernel is gone'):  # which it asks for when the pointer comes back
        if re.search('does not answer|was restarted', note.text_content()): break
        lab.mouse.move(0, 0)
        hand.photo().hover()
    assert faded(hand)


def faded(hand):
    "Return whether the answers on the photo are those of a kernel that is gone."
    labels = hand.photo().locator('.labels')
    return hand.page.locator('.updetr-old').count() and float(labels.evaluate('e => getComputedStyle(e).opacity')) < .5


def test_all_cells_can_be_run_again(lab, front, folder):
    "In the same kernel, and after the page was loaded again (which is all that can be done in Voilà)."
    for load in (None, lab.reload)[front == 'voila':]:
        run(lab, front, folder, load)
        assert lab.locator('[data-mime-type="application/vnd.jupyter.error"]').count() == 0
        Hand(lab, folder).box(120, 80, 260, 200)


def test_the_page_without_jupyter(browser, tmp_path):
    "`python -m updetr localize` with a photo of the working folder, and nothing else: a box is drawn, and found."
    installed('voila')
    Image.open(PATHS['coffee']).resize((300, 200)).save(tmp_path / 'mine.png')
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    command = [sys.executable, '-m', 'updetr', 'localize', 'mine.png', '--no-browser', f'--port={port}']
    env = os.environ | {'PYTHONPATH': os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]), 'OMP_NUM_THREADS': '1'}
    with open(tmp_path / 'out.log', 'w') as log:
        server = subprocess.Popen(command, cwd=tmp_path, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        while 'is running at' not in (tmp_path / 'out.log').read_text():
            assert server.poll() is None, (tmp_path / 'out.log').read_text()
            time.sleep(.2)
        page = browser.new_page(viewport=dict(width=1300, height=1000))
        page.goto(f'http://127.0.0.1:{port}/', timeout=120_000, wait_until='commit')
        hand = Hand(page, tmp_path)
        playwright.expect(hand.photo()).to_be_visible()
        hand.drag(90, 20, 210, 100)
        playwright.expect(page.get_by_text('90 – 210')).to_be_visible()  # the box in the photo's own pixels
        playwright.expect(page.get_by_text(re.compile('found at'))).to_be_visible()
        assert page.locator('select').first.input_value() == 'mine.png'
        page.close()
    finally:
        server.terminate()
        server.wait(20)
