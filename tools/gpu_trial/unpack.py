"""Packs that travel with a borrowed GPU machine: takes the shards that came with this call, and unpacks each pack that
is whole.

    python3 unpack.py [PACK...]      GPU_PACKS/site-PACK is what comes of it

manifest.json beside this file says of each pack which shards it has: by the shard's name, the folder beside this file's
own in which it travels, its SHA-256, and the bytes that it unpacks to. A shard is a tar archive, compressed by xz. A
pack of which shards are still to come with other calls stays packed, and those that are here are kept. Imports nothing
but the standard library.
"""

from __future__ import annotations

import compileall
import hashlib
import json
import lzma
import multiprocessing
import os
import shutil
import sys
import tarfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
TARGET = Path(os.environ.get("GPU_PACKS", "/opt/gpu_packs"))
_MOST_PROCESSES = 16
_BLOCK = 2**20
_ZEROS = bytes(_BLOCK)


def main(packs: list[str]) -> None:
    """All packs of the manifest where none is named. Exits where a shard is not what was packed."""
    manifest = json.loads((HERE / "manifest.json").read_text())
    began, to_unpack = time.monotonic(), []
    for pack in packs or manifest:
        if site(pack).exists():
            print(f"packs: {pack} is there already")
            continue
        shards = manifest[pack]
        absent = sorted({shards[name]["folder"] for name in shards if not take(pack, name, shards[name])})
        if absent:
            print(f"packs: {pack} is not whole: it wants {', '.join(absent)}")
            continue
        shutil.rmtree(fresh(pack), ignore_errors=True)  # of a call that was cut off
        to_unpack += [(pack, name) for name in shards]
    if to_unpack:
        largest_first = sorted(to_unpack, key=lambda each: -manifest[each[0]][each[1]]["unpacked"])
        processes = min(_MOST_PROCESSES, len(to_unpack), os.cpu_count() or 1)
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            pool.starmap(unpack, largest_first, chunksize=1)
    for pack in dict.fromkeys(pack for pack, _ in to_unpack):
        compileall.compile_dir(fresh(pack), ddir=str(site(pack)), quiet=2, workers=0, maxlevels=30)
        fresh(pack).rename(site(pack))
        shutil.rmtree(TARGET / "in" / pack)
    print(f"packs: unpacked {len(to_unpack)} shards in {time.monotonic() - began:.1f} s")


def site(pack: str) -> Path:
    return TARGET / f"site-{pack}"


def fresh(pack: str) -> Path:
    return TARGET / f"site-{pack}.new"


def take(pack: str, name: str, shard: dict) -> bool:
    """Whether the shard is here, whole, from this call or an earlier one."""
    kept = TARGET / "in" / pack / name
    came = HERE.parent / shard["folder"] / name
    if not kept.exists() and came.exists():
        data = came.read_bytes()
        if hashlib.sha256(data).hexdigest() != shard["sha256"]:
            raise SystemExit(f"packs: {came} is not what was packed: pack it again")
        kept.parent.mkdir(parents=True, exist_ok=True)
        new = kept.with_name(f"{name}.new")
        new.write_bytes(data)
        new.rename(kept)  # a call that is cut off leaves no half of a shard
    return kept.exists()


def unpack(pack: str, name: str) -> None:
    with lzma.open(TARGET / "in" / pack / name) as data, tarfile.open(fileobj=data, mode="r|") as archive:
        for member in archive:
            place = (fresh(pack) / member.name).resolve()
            if not place.is_relative_to(fresh(pack).resolve()):
                raise SystemExit(f"packs: {name} has a file outside its folder: {member.name}")
            place.parent.mkdir(parents=True, exist_ok=True)
            source = archive.extractfile(member)
            if source is None:  # a folder: made with its first file
                continue
            with place.open("wb") as copy:
                while block := source.read(_BLOCK):
                    if block == _ZEROS[: len(block)]:
                        copy.seek(len(block), os.SEEK_CUR)  # a hole, as where machine code was taken out of a library
                    else:
                        copy.write(block)
                copy.truncate(member.size)
            place.chmod(member.mode)


if __name__ == "__main__":
    main(sys.argv[1:])
