"""The operations on the catalogs that kernels, or images, are pulled from."""

from __future__ import annotations

from dataclasses import asdict
from typing import Generic

from banger.api import models as m
from banger.catalogs.format import E
from banger.catalogs.local import Catalogs, Origin
from banger.daemon.jobs import Report, Workers
from banger.job import Job


class CatalogService(Generic[E]):
    """Adds, lists, removes and refreshes catalogs; they have locks of their own."""

    def __init__(self, catalogs: Catalogs[E], workers: Workers) -> None:
        self._catalogs = catalogs
        self._workers = workers

    async def add(self, request: m.CatalogAdd, report: Report) -> m.CatalogInfo:
        return await self._workers.run(
            lambda job: _info(self._catalogs.add(request.location, request.name, request.public_key, job)), report
        )

    async def list(self, request: m.Empty, report: Report) -> m.CatalogList:
        return await self._workers.run(lambda job: self._list())

    async def delete(self, request: m.NameRequest, report: Report) -> m.Empty:
        await self._workers.run(lambda job: self._catalogs.remove(request.name))
        return m.Empty()

    async def refresh(self, request: m.CatalogRefresh, report: Report) -> m.CatalogList:
        def work(job: Job) -> m.CatalogList:
            self._catalogs.refresh(request.names, job)
            listed = self._list().catalogs
            return m.CatalogList([catalog for catalog in listed if not request.names or catalog.name in request.names])

        return await self._workers.run(work, report)

    def _list(self) -> m.CatalogList:
        return m.CatalogList([_info(origin) for origin in self._catalogs.list_all()])


def _info(origin: Origin) -> m.CatalogInfo:
    return m.CatalogInfo(**asdict(origin))
