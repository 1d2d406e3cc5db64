"What lies around a run: files that others read, downloads that break off, memory, variables, the commit of the code."
import argparse
import dataclasses
import http.client
import http.server
import os
import resource
import shutil
import subprocess
import threading
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from torchvision.transforms.v2 import functional as F

from updetr.core import checkpoint, shipped
from updetr.core.checkpoint import export_weights, save_tensors, write_atomic
from updetr.core.config import PLACES, PretrainConfig
from updetr.core.photos import as_image, builtin_photos, read_photo
from updetr.core.report import git_commit
from updetr.core.shipped import WeightSource, fetch_weights
from updetr.data import loader
from updetr.experiments import runner
from updetr.model.detr import build_detr
from updetr.predict.detector import Detector
from updetr.predict.localizer import QueryPatchLocalizer
from updetr.predict.oneshot_detector import OneShotDetector
from updetr.predict.runs import usual_parameters
from updetr.predict.segmenter import PanopticSegmenter
from updetr.tasks.cnn_task import CNNConfig
from updetr.tasks.finetune import FinetuneConfig
from updetr.tasks.masks import DETRsegm
from updetr.tasks.oneshot import OneShotConfig
from updetr.tasks.panoptic_task import PanopticConfig
from updetr.train import loop
from updetr.train.board import WandbBoard
from updetr.train.launch import _environment
from updetr.train.resume import refuse_changes


@pytest.fixture
def umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


def test_shared_weights_can_be_read_by_others(tmp_path, umask):
    "As the umask says: safetensors itself makes files for their owner only"
    def plain(path): save_tensors(path, {'a': torch.ones(3)})
    for write in (plain, lambda path: write_atomic(path, plain)):
        write(tmp_path / 'a.safetensors')
        assert (tmp_path / 'a.safetensors').stat().st_mode & 0o777 == 0o644


def test_a_full_disk_is_named_for_tensors_too(tmp_path, monkeypatch):
    def full(*args): raise SafetensorError('Error while serializing: I/O error: No space left on device (os error 28)')
    monkeypatch.setattr(checkpoint, 'save_file', full)
    with pytest.raises(OSError, match='no room for a.safetensors'):
        write_atomic(tmp_path / 'a.safetensors', lambda p: save_tensors(p, {'a': torch.ones(3)}))
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize('kind', [PretrainConfig, FinetuneConfig, OneShotConfig, PanopticConfig, CNNConfig])
def test_no_folder_of_this_machine_goes_with_shared_weights(kind, tmp_path):
    "Nor does a run that goes on mind where they are now"
    names = [f.name for f in dataclasses.fields(kind) if f.name.split('_')[0] in ('data', 'images', 'pngs', 'instances', 'pretrain')]
    assert {'data'} <= set(names) <= set(PLACES) and (kind is PretrainConfig or 'images_val' in names)
    cfg = {name: f'/somewhere/{name}' for name in names}
    export_weights(tmp_path / 'a.safetensors', torch.nn.Linear(1, 1), cfg | {'lr': 1.})
    with safe_open(tmp_path / 'a.safetensors', 'pt') as f: assert '/somewhere' not in f.metadata()['config']
    refuse_changes(tmp_path, cfg, {name: f'/elsewhere/{name}' for name in names})
    with pytest.raises(ValueError, match='lr'): refuse_changes(tmp_path, cfg | {'lr': 1.}, cfg | {'lr': 2.})


class Stump(http.server.BaseHTTPRequestHandler):
    "A server whose connection ends early, or does not"
    content, says = b'', 0

    def do_GET(self):
        self.send_response(200)
        self.send_header('Content-Length', str(self.says))
        self.end_headers()
        self.wfile.write(self.content)

    def log_message(self, *args): pass


def test_a_download_that_broke_off_is_not_kept(tmp_path, monkeypatch):
    torch.save({'a': torch.arange(5000)}, tmp_path / 'whole.pth')
    whole = (tmp_path / 'whole.pth').read_bytes()
    server = http.server.HTTPServer(('127.0.0.1', 0), Stump)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    url = f'http://127.0.0.1:{server.server_port}/net.pth'
    monkeypatch.setitem(shipped.WEIGHTS, ('net', 'own'), WeightSource(url, 'none'))
    Stump.says, Stump.content = len(whole), whole[:3000]
    with pytest.raises(FileNotFoundError, match='net.pth'): fetch_weights('net', 'own')
    Stump.content = whole
    assert torch.load(fetch_weights('net', 'own'))['a'][-1] == 4999
    server.shutdown()


def test_a_download_that_fails_says_what_to_copy(tmp_path, monkeypatch):
    "Also where the cache cannot be written, and where the server's answer is none."
    (tmp_path / 'file').touch()
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'file'))
    with pytest.raises(FileNotFoundError, match='Copy https://.*\nto .*swav_800ep'): fetch_weights('resnet50', 'swav')

    def broken(*args, **kwargs): raise http.client.IncompleteRead(b'half')
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    monkeypatch.setattr(torch.hub, 'download_url_to_file', broken)
    with pytest.raises(FileNotFoundError, match='Copy https://'): fetch_weights('resnet50', 'swav')


def test_only_some_memory_is_used_for_decoded_photos(tmp_path, monkeypatch):
    "The photos that were read last are not decoded again, as long as they are small"
    read = []
    def fake(path):
        read.append(path)
        return torch.zeros(3, 10, size[0], dtype=torch.uint8)
    monkeypatch.setattr(loader, 'read_or_less', fake)
    monkeypatch.setattr(loader, '_KEPT', loader.OrderedDict())
    monkeypatch.setattr(loader, '_ROOM', 3 * 10 * 100)
    paths = [tmp_path / f'{k}.jpg' for k in range(40)]
    for path in paths: path.touch()

    def decoded(*numbers):
        read.clear()
        for k in numbers: loader._cached_photo(str(paths[k]))
        return len(read)

    size = [1]
    assert decoded(0, 1, 0, 1) == 2                   # kept
    assert decoded(*range(40)) == 38                  # 32 of them at most ...
    assert decoded(*range(8, 40), 8) == 0 and decoded(0) == 1
    size = [60]
    assert decoded(20, 21, 20) == 0                   # ... read small before
    loader._KEPT.clear()
    assert decoded(20, 21, 20) == 3                   # one fills the room
    size = [200]
    assert decoded(22, 22) == 2 and not loader._KEPT  # larger than the room
    os.utime(paths[20], (1, 1))
    size = [1]
    assert decoded(20, 20) == 1


def test_trainings_leave_the_variables_of_their_caller(monkeypatch):
    "Else the next launch from the same kernel would see no GPU"
    seen = []

    class Context:
        def set_forkserver_preload(self, names): pass
        def Process(self, **given):
            class Process:
                def start(self): seen.append(dict(os.environ))
            return Process()

    monkeypatch.setattr(runner.multiprocessing, 'get_context', lambda kind: Context())
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    before = dict(os.environ)
    runner.start_process('run', 3)
    assert dict(os.environ) == before and seen[0]['CUDA_VISIBLE_DEVICES'] == '' and seen[0]['OMP_NUM_THREADS'] == '3'


def test_threads_are_as_many_as_cores_that_are_lent(monkeypatch):
    monkeypatch.setattr('updetr.train.launch.usable_cores', lambda: 6)
    for name in ('OMP_NUM_THREADS', 'GOMP_SPINCOUNT'): monkeypatch.delenv(name, raising=False)
    assert [_environment(n, 0, 'm', {})['OMP_NUM_THREADS'] for n in (1, 2, 4, 9)] == ['6', '3', '1', '1']
    monkeypatch.setenv('OMP_NUM_THREADS', '5')
    monkeypatch.setenv('GOMP_SPINCOUNT', '7')
    env = _environment(1, 0, 'm', {})
    assert env['OMP_NUM_THREADS'] == '5' and env['GOMP_SPINCOUNT'] == '7'


def test_the_commit_is_the_package_s_own(tmp_path, monkeypatch):
    "Wherever the work is done: another repository's commit says nothing of this code"
    mine = git_commit()
    def git(*words):
        call = ['git', '-C', str(tmp_path), '-c', 'user.name=a', '-c', 'user.email=b', *words]
        subprocess.run(call, check=True, capture_output=True)
    git('init')
    git('commit', '--allow-empty', '-m', 'theirs')
    # an environment inside a project, which does not track it
    (tmp_path / 'env' / 'updetr').mkdir(parents=True)
    (tmp_path / 'env' / 'updetr' / '__init__.py').touch()
    monkeypatch.chdir(tmp_path)
    assert git_commit() == mine and git_commit(tmp_path / 'env' / 'updetr') == 'unknown'
    git('add', '.')
    git('commit', '-m', 'tracked')
    at = tmp_path / 'env' / 'updetr'
    assert len(git_commit(at)) == 12
    # A changed package or notebook is another code, in a subfolder too. A log, another package of the
    # same name at the top, and what nobody tracks are not.
    code = [tmp_path / 'env' / name for name in ('updetr/__init__.py', 'updetr/core/a.py', 'nbs/a.ipynb')]
    others = [tmp_path / name for name in ('env/log.txt', 'updetr/a.py')]
    for file in code + others:
        file.parent.mkdir(exist_ok=True)
        file.touch()
    git('add', '.')
    git('commit', '-m', 'all')
    clean = git_commit(at)
    (at / 'new.py').touch()
    for file in code + others:
        file.write_text('x', encoding='utf-8')
        assert git_commit(at) == clean + '+changes' * (file in code)
        git('checkout', str(file))


@pytest.mark.parametrize('size', [240, 300])
def test_a_resized_picture_of_floats_is_a_picture(size):
    "An antialiased resize goes a little beyond white: it is as good as the same resize of bytes"
    for photo in builtin_photos()[:6]:
        image = read_photo(photo.path)
        floats = F.resize(F.to_dtype(image, torch.float32, scale=True), [size], antialias=True)
        assert (as_image(floats).int() - F.resize(image, [size], antialias=True).int()).abs().max() <= 1
    assert as_image(torch.tensor([[[-5e-4, 1.0005]]]).expand(3, 1, 2)).tolist() == [[[0, 255]]] * 3
    with pytest.raises(ValueError, match='clip'): as_image(np.full((4, 4, 3), 1.2, np.float32))
    with pytest.raises(ValueError, match='uint8'): as_image(np.full((4, 4, 3), 200., np.float32))


def test_a_copied_run_has_a_curve_of_its_own(tmp_path):
    "On Weights & Biases; a run that was moved, or began before the place was kept, has the old one"
    def identity(name): return WandbBoard(tmp_path / name, None)._id()
    (tmp_path / 'a').mkdir()
    first = identity('a')
    shutil.copytree(tmp_path / 'a', tmp_path / 'copy')
    second = identity('copy')
    assert identity('a') == first != second == identity('copy')
    (tmp_path / 'a').rename(tmp_path / 'moved')
    assert identity('moved') == first
    (tmp_path / 'copy' / 'wandb_id.txt').write_text('0123')
    assert identity('copy') == '0123'


@pytest.mark.parametrize('system, bytes_a_unit', [('Linux', 1024), ('Darwin', 1)])
def test_memory_is_told_in_megabytes(system, bytes_a_unit, monkeypatch):
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    monkeypatch.setattr(loop.os, 'uname', lambda: SimpleNamespace(sysname=system))
    monkeypatch.setattr(loop.torch.cuda, 'is_available', lambda: False)
    assert loop.peak_memory_mb() == pytest.approx(held * bytes_a_unit / 2**20, rel=.05)


def test_a_value_that_is_computed_in_the_parameters_cell_is_no_default(tmp_path):
    cell = nbformat.v4.new_code_cell('lr: float = 4 * 1e-4\nepochs: int = 3', metadata={'tags': ['parameters']})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / 'a.ipynb')
    assert usual_parameters(tmp_path / 'a.ipynb') == {'epochs': 3}


def answers_of_all(file):
    "What the four classes for pictures answer, as numbers; `file` is of a panoptic DETR."
    image = torch.randint(256, (3, 60, 80), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    segments = PanopticSegmenter.from_checkpoint(file)(image, 0)
    found = [Detector.demo()(image, 0), OneShotDetector.demo()(image, image[:, :30, :30], threshold=0),
             QueryPatchLocalizer.demo()(image, [[9, 9, 50, 50]])]
    return [segments.ids, segments.attention, *(v for f in found for v in (f.boxes, f.scores))]


def test_torchs_default_type_changes_no_answer(tmp_path):
    "Somebody's notebook computes in float64; the pictures stay float32, and so do the models, whatever else is set."
    small = dict(backbone='resnet18', hidden_dim=32, nheads=8, enc_layers=1, dec_layers=1, dim_feedforward=32, num_queries=5)
    torch.manual_seed(0)
    model = DETRsegm(build_detr(250, **small))
    args = argparse.Namespace(dataset_file='coco_panoptic', masks=True)
    torch.save({'model': model.state_dict(), 'args': args}, tmp_path / 'panoptic.pth')
    want = answers_of_all(tmp_path / 'panoptic.pth')
    assert all(map(len, want))
    torch.set_default_dtype(torch.float64)
    try:
        got = answers_of_all(tmp_path / 'panoptic.pth')
        assert torch.get_default_dtype() == torch.float64
    finally: torch.set_default_dtype(torch.float32)
    for a, b in zip(got, want, strict=True): torch.testing.assert_close(a, b)
