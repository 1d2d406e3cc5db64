"The canvas by itself in a real browser: a page with nothing else, and a model that tells what it would send to Python."
import io
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

from updetr.predict.canvas import photo_canvas

playwright = pytest.importorskip('playwright.sync_api', reason='the browser tests need playwright: pip install playwright')
from tools.browser import CHROMIUM, PHONE, Hand, chromium  # noqa: E402 (needs playwright)

pytestmark = pytest.mark.skipif(not CHROMIUM, reason='the browser tests need Chromium: apt install chromium fonts-dejavu, or name it by '
                                                     'the environment variable CHROMIUM')
NAMES = 'label width height boxes marks colors selected picked draws several busy'.split()
SMALL = dict(viewport=dict(width=500, height=700))  # all of a photo's place is filled by a photo of 3 : 2
# `model` holds values as a notebook's does: who changes one is heard, what was changed is sent at once
BARE = """async ([script, css, values, views]) => {
  document.head.append(Object.assign(document.createElement('style'), {textContent: css}));
  const url = URL.createObjectURL(new Blob([script], {type: 'text/javascript'}));
  const program = (await import(url)).default, heard = {};
  let changed = {};
  window.sent = [];
  window.model = {
    get: k => values[k],
    set(k, v) {
      if (JSON.stringify(values[k]) === JSON.stringify(v)) return;
      values[k] = changed[k] = v;
      model.trigger(`change:${k}`);
    },
    save_changes() { if (Object.keys(changed).length) sent.push(changed); changed = {}; },
    send(message) { sent.push(message); },
    on(names, f) { for (const name of names.split(' ')) (heard[name] ??= []).push(f); },
    off(names, f) { for (const name of names.split(' ')) heard[name] = heard[name].filter(g => g !== f); },
    trigger(name, ...what) { for (const f of heard[name] ?? []) f(...what); },
    listeners: () => Object.values(heard).flat().length,
  };
  window.kernel = news => { for (const k in news) model.set(k, news[k]); changed = {}; };
  window.closes = [...Array(views)].map(() => {
    const el = document.body.appendChild(document.createElement('div'));
    return program.render({model, el});
  });
}"""


@pytest.fixture(scope='module')
def browser():
    "One Chromium for all tests."
    with chromium() as browser: yield browser


@contextmanager
def bare(browser, canvas, views=1, **options):
    "A page with nothing but this canvas, shown `views` times; `options`: of a page, such as PHONE."
    values = {name: getattr(canvas, name) for name in NAMES}
    page = browser.new_page(**options)
    wrong = []
    page.on('pageerror', lambda error: wrong.append(error))
    page.goto('data:text/html,<!doctype html><meta name=viewport content="width=device-width"><body>')
    page.evaluate(BARE, [canvas._esm, canvas._css, values, views])
    yield page
    page.close()
    assert wrong == [], 'no error in the script'


def asked_about(*boxes, labels=False):
    "A canvas with a photo of 300 x 200 px and these boxes; with an answer at each, if `labels`."
    canvas = photo_canvas()
    canvas.width, canvas.height = 300, 200
    canvas.boxes = list(boxes)
    if labels: canvas.marks = [dict(box=box, patch=i, text=f'{i + 1}: alike 0.50') for i, box in enumerate(boxes)]
    return canvas


def sent(page):
    "What was sent to Python since this was asked last; what only asks whether it is there is left out."
    return [m for m in page.evaluate('sent.splice(0)') if 'asked' not in m]


@pytest.mark.parametrize('size', [(200, 100), (100, 200), (4000, 6000), (90, 2000)], ids='{0[0]}x{0[1]}'.format)
def test_labels_and_handles_are_as_large_on_every_photo(browser, size):
    "On an upright photo, too, whose height the screen limits, and whose sides are empty: 24 px."
    canvas = photo_canvas()
    canvas.width, canvas.height = size
    canvas.boxes = [[10, 10, 80, 80]]
    canvas.marks = [dict(box=[10, 10, 80, 80], patch=0, text='1: alike 0.50')]
    with bare(browser, canvas, viewport=dict(width=900, height=700)) as page:
        heights = [e.bounding_box()['height'] for e in page.locator('.labels .ground, .queries .hit').all()]
        assert heights == pytest.approx([24] * 5, abs=.5)


@pytest.mark.parametrize('draws', [True, False])
def test_a_finger_scrolls_the_page_where_nothing_is_drawn(browser, draws, tmp_path):
    "On the photo of the target no box can be drawn; on the other one a finger draws, and the page stands still."
    canvas = photo_canvas(draws=draws)
    canvas.width, canvas.height = 300, 300
    with bare(browser, canvas, **PHONE) as page:
        page.add_style_tag(content='body {height: 3000px}')
        hand = Hand(page, tmp_path)
        hand.touch(100, 250, 140, 50)
        page.wait_for_function('draws => draws ? document.querySelector("[data-box]") : scrollY > 50', arg=draws)
        assert len(hand.drawn()) == draws and (page.evaluate('scrollY') == 0) == draws
        assert hand.photo().evaluate('e => getComputedStyle(e).cursor') == ('crosshair' if draws else 'auto')


def answer(page):
    "Say, as Python does, that all that was sent has come."
    page.evaluate('sent.filter(m => m.asked).forEach(m => model.trigger("msg:custom", {heard: m.asked}))')


ONE, TWO = [20, 20, 100, 100], [150, 60, 250, 160]


def test_a_patch_that_is_clicked_has_the_focus(browser, tmp_path):
    "On its border or a corner, without a drag: delete removes this patch, and not the one that was touched before."
    for place in ((200, 60), (250, 160)):
        with bare(browser, asked_about(ONE, TWO), **SMALL) as page:
            hand = Hand(page, tmp_path)
            page.locator('[data-box="0"]').focus()
            page.mouse.click(*hand.path(place)[0])
            assert hand.focus() == '1' and sent(page) == [{'selected': 1}]
            page.keyboard.press('Delete')
            assert hand.drawn() == [ONE]


@pytest.mark.parametrize('corner', range(4))
def test_a_corner_goes_with_the_pointer(browser, tmp_path, corner):
    "It does not jump to the place where it was touched, up to 12 px of the screen beside it: a small patch would change its size at a tap."
    box, wanted = [100, 100, 112, 110], [100, 100, 112, 110]
    side = (-1, 1)[corner % 2], (-1, 1)[corner // 2]
    for axis, way in enumerate(side): wanted[axis + (2 if way > 0 else 0)] += 10 * way
    with bare(browser, asked_about(box), **SMALL) as page:
        r = page.locator(f'[data-corner="{corner}"]').bounding_box()
        middle, scale = (r['x'] + r['width'] / 2, r['y'] + r['height'] / 2), page.locator('svg').bounding_box()['width'] / 300
        page.mouse.move(*(v + 4 * way for v, way in zip(middle, side)))
        page.mouse.down()
        page.mouse.move(*(v + (4 + 10 * scale) * way for v, way in zip(middle, side)), steps=3)
        page.mouse.up()
        assert sent(page)[-1]['boxes'] == [wanted]


def test_keys_that_edit_patches_do_nothing_on_an_answer(browser):
    "Only enter and space ask where it looked; escape and delete did, too."
    with bare(browser, asked_about(ONE, TWO, labels=True), **SMALL) as page:
        label = page.locator('[data-mark="1"]')
        for key in ('Escape', 'Delete', 'Backspace', 'ArrowLeft'):
            label.press(key)
            assert sent(page) == [], key
        label.press('Enter')
        assert sent(page) == [{'picked': 1}, {'selected': 1}]
        label.press(' ')
        assert sent(page) == [{'picked': -1}]


def test_what_keys_do_is_sent_once_and_not_lost(browser, tmp_path):
    "A deletion is one message, though its patch loses the focus; a key may be held while a drag begins."
    with bare(browser, asked_about(ONE, TWO), **SMALL) as page:
        page.locator('[data-box="1"]').press('Delete')
        assert sent(page) == [{'selected': 1}, {'boxes': [ONE], 'selected': 0}]
        page.keyboard.down('ArrowRight')
        page.keyboard.down('Shift')
        Hand(page, tmp_path).drag(*TWO)
        moved = [23, 20, 103, 100]  # by a hundredth of 300 px
        assert sent(page) == [{'boxes': [moved]}, {'boxes': [moved, TWO], 'selected': 1}]


def test_a_second_view_waits_for_its_own_answer(browser, tmp_path):
    "What the first view was answered is no answer to what the second one asks: it says that Python works."
    with bare(browser, asked_about(), views=2, **SMALL) as page:
        notes, hand = page.locator('.updetr-state'), Hand(page, tmp_path)
        for box in (ONE, TWO):
            hand.drag(*box)
            answer(page)
        page.locator('svg').nth(1).hover()
        playwright.expect(notes.nth(1)).to_have_text('working …')
        assert notes.nth(0).text_content() == ''


@pytest.mark.parametrize('device', [SMALL, PHONE], ids=['mouse', 'finger'])
def test_a_drag_whose_end_is_not_seen_is_given_up(browser, tmp_path, device):
    "The photo is taken from the page, as notebooks do with cells out of sight, and comes back: a finger could never draw on it again."
    with bare(browser, asked_about(ONE), **device) as page:
        hand = Hand(page, tmp_path)
        draw = hand.touch if device is PHONE else hand.drag
        frame = 'await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));'
        take = f"""async () => {{ const svg = document.querySelector('svg'), view = svg.parentElement;
            svg.addEventListener('gotpointercapture', async () => {{
              await Promise.resolve(); view.remove(); {frame} document.body.append(view); {frame} window.back = true;
            }}, {{once: true}}); }}"""
        page.evaluate(take)
        draw(*TWO)
        page.wait_for_function('window.back')
        assert hand.drawn() == [ONE] and sent(page) == []
        draw(*TWO)
        page.wait_for_function('model.get("boxes")[0][0] > 100')
        assert sent(page)[-1]['boxes'] == hand.drawn()


def test_the_word_about_too_many_patches_goes_with_one_of_them(browser, tmp_path):
    "Also where the button removes it, in Python."
    canvas = asked_about(ONE, TWO)
    canvas.colors = canvas.colors[:2]
    with bare(browser, canvas, **SMALL) as page:
        note = page.locator('.updetr-state')
        page.keyboard.down('Shift')
        Hand(page, tmp_path).drag(110, 120, 140, 180)
        answer(page)
        playwright.expect(note).to_contain_text('2 patches at once')
        page.evaluate('boxes => kernel({boxes})', [ONE])
        playwright.expect(note).to_have_text('')


@pytest.mark.parametrize('width', [60, 1200])
def test_the_ring_round_an_answer_with_the_focus_is_as_thick_on_every_photo(browser, width):
    "4 px of the screen, around its label; a browser's own ring would hide half of a small photo."
    canvas = asked_about()
    canvas.width, canvas.height = width, width * 2 // 3
    box = [.3 * width, .3 * width, .6 * width, .6 * width]
    canvas.marks = [dict(box=box, patch=0, text='1: alike 0.50')]
    with bare(browser, canvas, **SMALL) as page:
        label, shots = page.locator('[data-mark]'), []
        r = label.locator('.ground').bounding_box()
        for act in ('e => e.blur()', 'e => e.focus({focusVisible: true})'):
            label.evaluate(act)
            shots.append(np.array(Image.open(io.BytesIO(page.screenshot())).convert('RGB'), int))
        rows, columns = np.nonzero((shots[1] != shots[0]).any(2))
        changed = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        assert changed == pytest.approx([r['x'] - 2, r['y'] - 2, r['x'] + r['width'] + 2, r['y'] + r['height'] + 2], abs=1.1)
