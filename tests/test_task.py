"""The pre-training task in unusual settings, in this process: few and broken photos, live views, a trained CNN, averaged weights."""
import dataclasses
import json
import pickle
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from updetr.core.checkpoint import load_checkpoint
from updetr.core.config import make_config
from updetr.core.photos import BadPhoto, builtin_photos
from updetr.data.loader import PatchTask, Views, epoch_batches, read_or_less
from updetr.model.backbone import Backbone
from updetr.model.losses import SetCriterion
from updetr.model.transformer import Transformer
from updetr.model.weights import load_updetr
from updetr.tasks.pretext import draw_photo, pretext_set, random_predict
from updetr.tasks.pretrain_task import PretrainTask, encode_ahead, live_batches, photo_lists
from updetr.train.loop import Processes, TrainState, train, train_step
from updetr.train.progress import skipped_photos

SMALL = dict(backbone='test_resnet', weights='none', hidden_dim=16, nheads=2, enc_layers=1, dec_layers=2, dim_feedforward=16, num_queries=4,
             num_patches=2, batch_size=2, epochs=1, patch_size=32, num_workers=0, dropout=0., lr=1e-3, log_every=1)
VIEWS = dict(views=6, view_size=64, data='')


def save_photos(folder, n=4, size=(90, 60), broken=(), start=0):
    """`n` JPEGs of noise, width and height `size`; the numbers in `broken` lose the second half of their bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        pixels = np.random.default_rng(start + i).integers(0, 255, (*size[::-1], 3), np.uint8)
        Image.fromarray(pixels).save(path := folder / f'{i}.jpg')
        if i in broken: path.write_bytes(path.read_bytes()[:len(path.read_bytes()) // 2])
    return folder


def make_task(folder, preset='paper', device='cpu', **changes):
    folder.mkdir(parents=True, exist_ok=True)
    return PretrainTask(make_config(preset, **SMALL | changes), folder, Processes(device=torch.device(device)))


def train_small(folder, preset='paper', **changes):
    task = make_task(folder, preset, **changes)
    return task, train(task, task.cfg, folder, task.processes)


def rows(folder): return [json.loads(line) for line in (folder / 'log.txt').read_text().splitlines()]


def same(a, b, **tolerance): return all(torch.allclose(a[k].float(), b[k].float(), **tolerance) for k in a.keys() | b.keys())


@pytest.fixture(autouse=True)
def small_photos(monkeypatch):
    """Short sides of 64 px instead of 320 to 480."""
    monkeypatch.setattr('updetr.tasks.pretrain_task.PRETRAIN_SIZES', (64, 80))


def test_fewer_photos_than_a_batch_holds(tmp_path):
    save_photos(tmp_path / 'photos', 3)
    with pytest.raises(ValueError, match='batch_size 8 is larger than the 3 photos there are'):
        make_task(tmp_path / 'run', data=str(tmp_path / 'photos'), batch_size=8)


@pytest.mark.parametrize('setting', [{}, dict(views=24, view_size=64), dict(views=24, view_size=64, cache_features=True)],
                         ids=['photos', 'views', 'bank'])
def test_nested_folders_and_broken_files(tmp_path, setting, capsys):
    """Broken photos, text and tiny pictures among the good ones: trained on what is left, each broken file named once."""
    save_photos(tmp_path / 'photos' / 'a' / 'b', 3, broken=[1])
    save_photos(tmp_path / 'photos' / 'c', 3, size=(60, 90), broken=[0], start=10)
    save_photos(tmp_path / 'photos' / 'tiny', 2, size=(16, 40))
    (tmp_path / 'photos' / 'notes.txt').write_text('no photo')
    task, state = train_small(tmp_path / 'run', data=str(tmp_path / 'photos'), epochs=2, **setting)
    assert len(task.photos) == 6 and state.step == setting.get('views', 6)
    skipped = (tmp_path / 'run' / 'skipped.txt').read_text().splitlines()
    assert sorted('/'.join(Path(s.split(': ')[0]).parts[-2:]) for s in skipped) == ['b/1.jpg', 'c/0.jpg']
    told = [line.removeprefix('photo skipped: ') for line in capsys.readouterr().out.splitlines() if line.startswith('photo skipped: ')]
    assert told == skipped and skipped_photos(tmp_path / 'run').startswith('2 photos could not be read: ')


def test_a_resumed_run_notes_nothing_twice(tmp_path, capsys):
    """Also for a name in which lines end: each broken photo is one line of skipped.txt, however often it is met."""
    save_photos(tmp_path / 'photos', 6, broken=(1,))
    (tmp_path / 'photos/1.jpg').rename(tmp_path / 'photos/a\nb\u2028.jpg')
    for epochs in (2, 4):
        train_small(tmp_path / 'run', data=str(tmp_path / 'photos'), epochs=epochs, schedule='step', warmup=0., lr_drop=9)
        noted = (tmp_path / 'run/skipped.txt').read_text().split('\n')
        assert len(noted) == 2 and noted[0].startswith(f'{tmp_path}/photos/a b .jpg: cannot be decoded') and not noted[1]
    assert capsys.readouterr().out.count('photo skipped: ') == 1
    assert skipped_photos(tmp_path / 'run') == '1 photo could not be read: a b .jpg'


def test_whoever_takes_over_the_bank_of_views_is_told_of_broken_photos(tmp_path):
    save_photos(tmp_path / 'photos', 4, broken=(2,))
    views = VIEWS | dict(cache_features=True, data=str(tmp_path / 'photos'), views=12)
    for name in ('first', 'second'): make_task(tmp_path / name, **views).begin(resumed=False)
    first, second = ((tmp_path / name / 'skipped.txt').read_text() for name in ('first', 'second'))
    assert first == second and first.startswith(f'{tmp_path}/photos/2.jpg: ') and first.count('\n') == 1
    assert len(list(tmp_path.glob('banks/*/bank.json'))) == 1


def test_an_over_large_jpeg_is_trained_on_at_a_smaller_size(tmp_path, capsys):
    """81 megapixels are beyond the limit: listed with their own size, read at a half of it, and said. A PNG of as many is left out."""
    save_photos(tmp_path / 'photos', 4)
    large = Image.new('L', (9000, 9001), 99)
    large.save(tmp_path / 'photos/large.jpg')
    large.save(tmp_path / 'photos/large.png', compress_level=1)
    task, state = train_small(tmp_path / 'run', data=str(tmp_path / 'photos'))
    said = capsys.readouterr().out
    assert '5 photos' in said and 'large.png' not in task.photos.paths and state.step == 2
    assert '1 of more than 80,000,000 px are read smaller, first large.jpg' in said
    place = task.photos.paths.index('large.jpg')
    assert task.photos.sizes[place].tolist() == [9001, 9000]
    assert read_or_less(task.photos.path(place)).shape == (3, 4501, 4500)
    # it is asked about, too: in its place another photo was, or none
    assert (pretext_set([task.photos.path(place)], 1, 2).views == 99).all()
    draw_photo(random_predict('mid'), task.photos.path(place), 2)
    assert not (tmp_path / 'run/skipped.txt').exists()


def test_a_broken_heldout_photo_does_not_stop_the_picture(tmp_path):
    save_photos(tmp_path / 'data' / 'train', 2)
    save_photos(tmp_path / 'data' / 'val', 2, broken=[0])
    task, _ = train_small(tmp_path / 'run', data=str(tmp_path / 'data'))
    assert (len(task.photos), len(task.heldout)) == (2, 2) and (tmp_path / 'run' / 'preview.png').exists()


@pytest.mark.parametrize('size', [(90, 60), (60, 90), (17, 17)], ids=['landscape', 'portrait', 'smallest'])
def test_one_orientation_and_the_smallest_photos(tmp_path, size):
    task, state = train_small(tmp_path / 'run', data=str(save_photos(tmp_path / 'photos', 4, size)))
    assert state.step == 2 and len(task.photos) == 4 and len(task.heldout) == 0
    index = np.concatenate([b for _, b in epoch_batches(task.photos.sizes, 2, 0, 0)])
    assert sorted(index) == [0, 1, 2, 3]


def test_only_photos_that_are_too_small(tmp_path):
    with pytest.raises(ValueError, match='(?s)no usable photo.*2 too small'):
        make_task(tmp_path / 'run', data=str(save_photos(tmp_path / 'photos', 2, (16, 16))))


def test_lists_of_photos_that_were_damaged(tmp_path, capfd):
    """Half written, edited, hostile, missing: looked for anew, which is said; the run goes on with the photos it began with."""
    photos, run = save_photos(tmp_path / 'photos', 4), tmp_path / 'run'
    task, state = train_small(run, data=str(photos))
    assert state.step == 2
    kept = {name: (run / f'photos_{name}.json').read_text() for name in ('train', 'heldout')}
    about = json.loads(kept['train'])
    old = {k: v for k, v in about.items() if k != 'sum'}  # of a list without a checksum, as they were before
    outside = ['../secret.jpg', *about['paths'][1:]], [str(tmp_path / 'secret.jpg'), *about['paths'][1:]]
    swapped = [[s[1], s[0]] for s in about['sizes']]
    fewer = {k: about[k][:3] for k in ('paths', 'sizes')}
    broken = ['', kept['train'][:50], '[' * 100_000, '[]', None]
    broken += [json.dumps(about | change) for change in (fewer, {'sizes': swapped}, {'paths': about['paths'][::-1]})]
    broken += [json.dumps(old | {'paths': paths}) for paths in (*outside, [1, 2, 3, 4], 'abcd', about['paths'][:2])]
    broken += [json.dumps(old | {'sizes': sizes}) for sizes in ([[10**30, 1]] * 4, [[0, 0]] * 4, [[1.5, 2]] * 4, [[60]] * 4, 7)]
    for name in ('train', 'heldout'):
        for content in broken if name == 'train' else broken[:5]:
            if content is None: (run / f'photos_{name}.json').unlink()
            else: (run / f'photos_{name}.json').write_text(content)
            capfd.readouterr()
            again, _ = photo_lists(task.cfg, run, Processes())  # as a task of this run begins
            assert again.paths == task.photos.paths and (again.sizes == task.photos.sizes).all()
            assert capfd.readouterr().out.count('looked for anew') == 1, content
            assert (run / f'photos_{name}.json').read_text() == kept[name]
    (run / 'photos_train.json').write_text(json.dumps(old))
    make_task(run, data=str(photos))
    assert 'anew' not in capfd.readouterr().out


def test_banks_of_two_folders_are_not_mixed_up(tmp_path):
    """The same file names, other photos: other features."""
    banks = []
    for name in ('a', 'b'):
        photos = save_photos(tmp_path / name, 3, start=len(banks) * 10)
        task = make_task(tmp_path / 'runs' / name, data=str(photos), views=2, view_size=64, cache_features=True)
        task.begin(resumed=False)
        banks.append(task.bank.parts['feature'])
    assert len(list((tmp_path / 'runs' / 'banks').iterdir())) == 2 and not torch.equal(*banks)


def test_live_views_are_the_cached_ones(tmp_path):
    """In epoch 0 the bank holds what live views give; so the first epoch's losses agree within the bank's half precision."""
    live, cached = (tmp_path / n for n in ('live', 'cached'))
    setting = dict(VIEWS, backbone='tf_efficientnet_lite0', weights='builtin', features='blocks.2', mask_ratio=0.)
    train_small(live, 'demo', **setting, cache_features=False)
    train_small(cached, 'demo', **setting, cache_features=True)
    assert [r['train_loss'] for r in rows(live)] == pytest.approx([r['train_loss'] for r in rows(cached)], rel=1e-2)
    assert not (live / 'banks').exists()


def test_views_can_be_sent_to_workers():
    views = Views([p.path for p in builtin_photos('train')], PatchTask(num_patches=2, patch_size=32), 4)
    assert torch.equal(pickle.loads(pickle.dumps(views))[0, 1, 64]['photo'], views[0, 1, 64]['photo'])


def test_worker_processes_and_sigterm(tmp_path):
    """Two decoding processes, stopped by SIGTERM in the middle and resumed: the losses of an undisturbed run without workers."""
    photos = str(save_photos(tmp_path / 'photos', 8))
    train_small(tmp_path / 'whole', data=photos, epochs=2, dropout=.1)
    task = make_task(tmp_path / 'run', data=photos, epochs=2, dropout=.1, num_workers=2)
    batches = task.batches

    def stop_at_five(start, total):
        for i, batch in enumerate(batches(start, total), start):
            if i == 4: signal.raise_signal(signal.SIGTERM)
            yield batch

    task.batches = stop_at_five
    assert train(task, task.cfg, tmp_path / 'run', Processes()).step == 5 and not (tmp_path / 'run' / 'done.json').exists()
    train_small(tmp_path / 'run', data=photos, epochs=2, dropout=.1, num_workers=2)
    losses = [[(r['step'], r['train_loss']) for r in rows(tmp_path / n)] for n in ('run', 'whole')]
    assert losses[0] == losses[1] and len(losses[0]) == 8


def test_photos_that_vanish_meanwhile(tmp_path):
    """A folder that goes while a run reads it: a stop that names it; when it is back, the losses of an undisturbed run."""
    photos, gone = save_photos(tmp_path / 'photos', 8), tmp_path / 'gone'
    train_small(tmp_path / 'whole', data=str(photos), epochs=2, dropout=.1, save_every=2)
    task = make_task(tmp_path / 'run', data=str(photos), epochs=2, dropout=.1, save_every=2)
    batches = task.batches

    def hide_after_five(start, total):
        for i, batch in enumerate(batches(start, total), start):
            if i == 4: photos.rename(gone)
            yield batch

    task.batches = hide_after_five
    with pytest.raises(BadPhoto, match='8 photos in a row cannot be read, the first: .*photos/'):
        train(task, task.cfg, tmp_path / 'run', Processes())
    with pytest.raises(FileNotFoundError, match='no folder .*photos'):
        train_small(tmp_path / 'run', data=str(photos), epochs=2, dropout=.1, save_every=2)
    gone.rename(photos)
    train_small(tmp_path / 'run', data=str(photos), epochs=2, dropout=.1, save_every=2)
    losses = [{r['step']: r['train_loss'] for r in rows(tmp_path / n)} for n in ('run', 'whole')]
    assert losses[0] == losses[1] and len(losses[0]) == 8


def test_a_folder_that_is_renamed_while_it_trains(tmp_path):
    """The run goes on where its folder is, to the end and to the same weights; a copy under the old name stays as it was."""
    settings = dict(data=str(save_photos(tmp_path / 'photos', 8)), epochs=2, dropout=.1, save_every=2)
    train_small(tmp_path / 'whole', **settings)
    task = make_task(tmp_path / 'run', **settings)
    batches = task.batches

    def rename_after_three(start, total):
        for i, batch in enumerate(batches(start, total), start):
            if i == 3:
                (tmp_path / 'run').rename(tmp_path / 'better')
                shutil.copytree(tmp_path / 'better', tmp_path / 'run')
            yield batch

    task.batches = rename_after_three
    train(task, task.cfg, tmp_path / 'run', Processes())
    assert (tmp_path / 'better/done.json').exists() and not (tmp_path / 'run/done.json').exists()
    assert [r['train_loss'] for r in rows(tmp_path / 'better')] == [r['train_loss'] for r in rows(tmp_path / 'whole')]
    saved = [load_checkpoint(tmp_path / name / 'checkpoint.pth')['model'] for name in ('better', 'whole')]
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in saved), strict=True))


def test_photos_of_like_aspect_come_together_where_that_is_asked(tmp_path):
    "What is padded less is computed faster; each photo still comes once in an epoch."
    for k in range(16): save_photos(tmp_path / 'photos' / str(k), 1, (40 + 7 * k, 60), start=k)

    def spread(n):
        task = make_task(tmp_path / str(n), data=str(tmp_path / 'photos'), sort_aspects=n)
        batches = [[i for _, i, _ in items] for items in task.plan(0, 8)]
        assert sorted(sum(batches, [])) == list(range(16))
        return sum(np.ptp(task.photos.sizes[b, 1] / task.photos.sizes[b, 0]) for b in batches)
    assert spread(8) < spread(1) / 2


def test_micro_batches_of_photos(tmp_path):
    """Photos of one size, no batch statistics: two micro-batches are one batch."""
    photos = str(save_photos(tmp_path / 'photos', 4))
    _, one = train_small(tmp_path / 'one', data=photos, batch_size=4, own_group=True, mask_ratio=0.)
    _, two = train_small(tmp_path / 'two', data=photos, batch_size=4, own_group=True, mask_ratio=0., accumulate=2)
    assert one.step == two.step == 1
    assert rows(tmp_path / 'two')[0]['train_loss'] == pytest.approx(rows(tmp_path / 'one')[0]['train_loss'], rel=1e-4)
    assert rows(tmp_path / 'two')[0]['train_grad_norm'] == pytest.approx(rows(tmp_path / 'one')[0]['train_grad_norm'], rel=1e-3)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    photos = str(save_photos(tmp_path / 'photos', 4))
    states = [train_small(tmp_path / str(g), data=photos, gradient_checkpointing=g, dropout=.1)[1] for g in (False, True)]
    assert same(*(s.model.state_dict() for s in states), atol=1e-6)


def test_averaged_weights_are_what_is_loaded(tmp_path):
    _, state = train_small(tmp_path / 'run', data=str(save_photos(tmp_path / 'photos', 4)), epochs=2, ema=.5)
    loaded, _ = load_updetr(tmp_path / 'run' / 'checkpoint.pth')
    assert same(loaded.state_dict(), state.ema.module.state_dict(), atol=0)
    assert not same(loaded.state_dict(), state.model.state_dict())


def test_a_trained_cnn(tmp_path):
    """`frozen_backbone=False`: gradients reach layer2 to layer4 only (DETR's rule), and the checkpoint is a model again."""
    photos = str(save_photos(tmp_path / 'photos', 4))
    before = {n: p.detach().clone() for n, p in make_task(tmp_path / 'run', data=photos, frozen_backbone=False).model.named_parameters()}
    _, state = train_small(tmp_path / 'run', data=photos, frozen_backbone=False)
    changed = {n for n, p in state.model.named_parameters() if 'backbone' in n and not torch.equal(p, before[n])}
    assert {n.split('layer')[1][0] for n in changed if 'layer' in n} == {'2', '3', '4'} and all('layer' in n for n in changed)
    assert [g['initial_lr'] for g in state.optimizer.param_groups] == [state.cfg.lr, state.cfg.lr_backbone]
    assert same(load_updetr(tmp_path / 'run' / 'checkpoint.pth')[0].state_dict(), state.model.state_dict(), atol=0)


def test_a_loss_that_is_no_number_is_never_saved(tmp_path):
    """The log line that notices it comes before the save, also where `log_every` is no divisor of `save_every`."""
    task = make_task(tmp_path / 'run', data=str(save_photos(tmp_path / 'photos', 8)), epochs=2, log_every=100, save_every=3)
    batches = task.batches

    def broken(start, total):
        for i, batch in enumerate(batches(start, total), start): yield batch | ({'boxes': batch['boxes'] * np.inf} if i == 4 else {})

    task.batches = broken
    with pytest.raises((FloatingPointError, ValueError)): train(task, task.cfg, tmp_path / 'run', Processes())
    saved = load_checkpoint(tmp_path / 'run' / 'checkpoint.pth')
    assert saved['step'] == 3 and all(v.isfinite().all() for v in saved['model'].values())


def test_configuration_that_is_saved_is_the_one_that_ran(tmp_path):
    task, _ = train_small(tmp_path / 'run', data=str(save_photos(tmp_path / 'photos', 2)))
    assert load_checkpoint(tmp_path / 'run' / 'checkpoint.pth')['args'] == dataclasses.asdict(task.cfg)


def test_half_precision_reaches_the_network_only(tmp_path):
    "As a GPU trains (bf16 autocast, here on the CPU): photos and patches come in full precision, the CNN ahead of the step works in half."
    task = make_task(tmp_path / 'run', **VIEWS)
    full, half = (list(encode_ahead(task.model, live_batches(task, 0, 2), amp)) for amp in (False, True))
    assert len(half) == 2 and half[0]['feature'].dtype == half[0]['patch_feature'].dtype == torch.bfloat16
    for a, b in zip(full, half):
        for k in ('feature', 'patch_feature'): assert (a[k] - b[k]).norm() < .02 * a[k].norm()
        assert torch.equal(a['boxes'], b['boxes'])
    with torch.autocast('cpu', torch.bfloat16): ready = next(live_batches(task, 0, 2))
    assert all(torch.equal(ready[k], v) for k, v in next(live_batches(task, 0, 2)).items() if isinstance(v, torch.Tensor))


def test_gradients_have_the_precision_of_their_operation():
    "The backward pass leaves autocast: what was computed in full precision on the way there is so on the way back."
    class Boxes(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(8, 4)

        def forward(self, x):
            with torch.autocast('cpu', enabled=False): return self.head(x).square().mean(), {}
    torch.manual_seed(0)
    module, x = Boxes(), torch.randn(16, 8)
    want = torch.autograd.grad(module(x)[0], module.head.weight)[0]
    train_step(module, iter([x]), TrainState(module, make_config(lr=1e-9, clip_max_norm=1e9)), 1., amp=True)
    assert torch.equal(module.head.weight.grad, want)


def test_out_of_memory_is_told_with_sizes_and_the_way_out():
    class TooLarge(torch.nn.Linear):
        def forward(self, x): raise torch.OutOfMemoryError('CUDA out of memory')
    module = TooLarge(4, 1)
    said = r'step 1, with batch \(8, 4\) \(batch_size 4, accumulate 1\)\. accumulate=2 has fewer'
    with pytest.raises(torch.OutOfMemoryError, match=said):
        train_step(module, iter([torch.zeros(8, 4)]), TrainState(module, make_config(batch_size=4)), 1.)


def test_compile_is_handed_to_cnn_transformer_and_losses(tmp_path, monkeypatch):
    compiled = []
    for part in (Backbone, Transformer, SetCriterion): monkeypatch.setattr(part, 'compile', lambda part: compiled.append(part))
    task, state = train_small(tmp_path / 'run', **VIEWS, compile=True)
    assert compiled == [task.model.backbone[0], task.model.transformer, task.module.criterion] and state.step == 3
