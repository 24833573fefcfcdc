"""Requests and responses of the operations on catalogs."""

from __future__ import annotations

from dataclasses import field

from banger.api.models.base import Model


class CatalogAdd(Model):
    """A further catalog: `location` is a URL or the absolute path of a file, `public_key` minisign's or ''."""

    location: str
    name: str = ""
    public_key: str = ""


class CatalogInfo(Model):
    """A catalog to pull from; `updated` is what it says of itself, `refreshed_at` when it was fetched."""

    name: str
    location: str
    public_key: str
    entries: int
    updated: str
    refreshed_at: str
    problem: str = ""


class CatalogList(Model):
    catalogs: list[CatalogInfo]


class CatalogRefresh(Model):
    """No `names` means all catalogs."""

    names: list[str] = field(default_factory=list)
