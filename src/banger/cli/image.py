"""`banger image`: the local images and what can be pulled."""

from __future__ import annotations

import shlex

import click

from banger.api import models as m
from banger.api import operations as op
from banger.cli.connect import ensure_daemon
from banger.cli.errors import UsageFault
from banger.cli.lazy import Command, Entry, LazyGroup
from banger.cli.many import for_each
from banger.cli.options import IMAGE, KERNEL, LOCAL_PATH, PULLABLE_IMAGE, json_option
from banger.cli.progress import Display
from banger.cli.render import age, known_size, plain, print_fields, print_json, print_lines, shorten, table_lines
from banger.system import human_size

_DISTRO_WIDTH = 20  # so that lists fit into 100 columns

IMAGE_GROUP = LazyGroup(
    "image",
    {
        "list": Entry("image", "list_images", "List local images, or those that can be pulled."),
        "show": Entry("image", "show", "Show one local image."),
        "pull": Entry("image", "pull", "Fetch an image of a catalog or a registry."),
        "import": Entry("image", "import_image", "Make an image from a tar or a directory."),
        "register": Entry("image", "register", "Make an image of a file that stays where it is."),
        "promote": Entry("image_manage", "promote", "Copy the files of registered images and manage them."),
        "tag": Entry("image_manage", "tag", "Give an image a further name."),
        "history": Entry("image_manage", "history", "Show how an image was made."),
        "verify": Entry("image_manage", "verify", "Read local images again and check them."),
        "export": Entry("image_manage", "export", "Write an image so that other tools can use it."),
        "rm": Entry("image", "remove", "Remove local images."),
        "prune": Entry("image_manage", "prune", "Remove images that nothing uses."),
        "cache": Entry("image_cache", "CACHE_GROUP", "Manage the layers that are kept for pulls."),
        "catalog": Entry("image_catalog", "CATALOG_GROUP", "Manage the catalogs that images are pulled from."),
    },
    help="""Root filesystems that VMs start from.

    An image is shared, read-only, by the VMs made from it; each VM writes to a layer of its own.""",
    examples="""
    banger image list --available    what can be pulled
    banger image pull NAME           fetch one
    """,
)


@click.command(
    "list",
    cls=Command,
    epilog="""
    banger image list
    banger image list --available --json
    """,
)
@click.option("--available", is_flag=True, help="List what can be pulled instead.")
@click.option("-q", "--quiet", is_flag=True, help="Print names only, one a line.")
@click.option("-a", "--all", is_flag=True, hidden=True, expose_value=False)  # habit: it lists all in any case
@json_option
def list_images(available: bool, quiet: bool, as_json: bool) -> None:
    """List local images, or those that can be pulled."""
    client = ensure_daemon()
    if available:
        catalog = client.call(op.IMAGE_CATALOG, m.Empty())
        if as_json:
            print_json(catalog)
            return
        if quiet:
            print_lines(dict.fromkeys(entry.name for entry in catalog.entries))
            return
        print_lines(
            table_lines(
                ["NAME", "CATALOG", "STATE", "ARCH", "DISTRO", "KIND", "SIZE", "DESCRIPTION"],
                [
                    [
                        entry.name,
                        entry.origin,
                        entry.state,
                        entry.arch,
                        entry.distro,
                        entry.kind,
                        known_size(entry.size_bytes),
                        entry.description,
                    ]
                    for entry in catalog.entries
                ],
                cut=True,
            )
        )
        return
    local = client.call(op.IMAGE_LIST, m.Empty())
    if as_json:
        print_json(local)
        return
    if quiet:
        print_lines([image.name for image in local.images])
        return
    print_lines(
        table_lines(
            ["NAME", "ARCH", "DISTRO", "SIZE", "IMPORTED", "KERNEL", "MANAGED", "PROBLEM"],
            [
                [
                    image.name,
                    image.arch,
                    shorten(image.distro.partition(" (")[0], _DISTRO_WIDTH),
                    known_size(image.size_bytes),
                    age(image.imported_at),
                    "its own" if image.own_kernel else image.kernel_ref,
                    "" if image.managed else "no",
                    image.problem and f"broken: {image.problem}",
                ]
                for image in local.images
            ],
            optional=("KERNEL", "MANAGED", "PROBLEM"),
        )
    )


@click.command(cls=Command, epilog="banger image show NAME")
@click.argument("name", type=IMAGE)
@json_option
def show(name: str, as_json: bool) -> None:
    """Show one local image."""
    image = ensure_daemon().call(op.IMAGE_SHOW, m.NameRequest(name))
    if as_json:
        print_json(image)
        return
    print_fields(
        [
            ("name", image.name),
            ("arch", image.arch),
            ("distro", image.distro),
            ("size", human_size(image.size_bytes)),
            ("kernel", "its own" if image.own_kernel else image.kernel_ref),
            ("managed", "" if image.managed else "no"),
            ("work-seed", image.work_seed),
            ("home", image.home),
            ("init", image.init),
            ("entrypoint", shlex.join(image.entrypoint)),
            ("command", shlex.join(image.command)),
            *(("env", entry) for entry in image.env),
            ("user", image.user),
            ("workdir", image.workdir),
            ("ports", ", ".join(image.exposed_ports)),
            ("volumes", ", ".join(image.volumes)),
            ("stop signal", image.stop_signal),
            *(("label", f"{name}={value}") for name, value in image.labels.items()),
            ("source", image.source),
            ("catalog", image.origin),
            ("digest", image.digest),
            ("layers", str(image.layers or "")),
            ("sha256", image.sha256),
            ("created", image.created),
            ("imported", image.imported_at),
            ("used by", ", ".join(image.vms)),
            *(("warning", warning) for warning in image.warnings),
            ("problem", image.problem),
        ]
    )


@click.command(
    cls=Command,
    epilog="""
    banger image pull debian-trixie
    banger image pull corp/edge --as edge
    banger image pull docker.io/library/alpine:3.20 --kernel-ref NAME
    banger image pull ghcr.io/org/app@sha256:... --platform linux/arm64
    banger image pull docker-archive:saved.tar.gz
    """,
)
@click.argument("name", metavar="NAME|REF", type=PULLABLE_IMAGE)
@click.option("--as", "save_as", metavar="NAME", type=IMAGE, help="Local name, instead of one made of NAME or REF.")
@click.option("--platform", metavar="OS/ARCH", default="", help="Which one to take: linux/amd64 or linux/arm64.")
@click.option("--kernel-ref", metavar="KERNEL", type=KERNEL, help="Kernel that VMs of this image boot.")
@click.option("--force", is_flag=True, help="Replace a local image of that name, once the new one is complete.")
@json_option
def pull(name: str, save_as: str | None, platform: str, kernel_ref: str | None, force: bool, as_json: bool) -> None:
    """Fetch an image: a catalog's NAME (or CATALOG/NAME), or any container image.

    REF is [REGISTRY/]REPOSITORY[:TAG][@DIGEST], on docker.io (config.toml: default_registry) unless it names a
    registry; ORG/APP alone means a catalog, so write ORG/APP:latest. What docker, podman, skopeo and buildah write into
    files can be read too: oci:DIR[:TAG], oci-archive:FILE[:TAG], docker-archive:FILE[:REF].

    The same release is not fetched twice. When a tag has moved, --force replaces the image, or --as adds another.
    """
    request = m.ImagePull(name, save_as or "", platform, kernel_ref or "", force)
    with Display() as display:
        image = ensure_daemon().call(op.IMAGE_PULL, request, display.reporter(f"pulling {save_as or name}"))
    print_arrived(image, as_json, "pulled")


@click.command(
    "import",
    cls=Command,
    epilog="""
    banger image import mine --from rootfs.tar.zst
    banger image import mine --from rootfs/ --kernel-ref NAME
    """,
)
@click.argument("name", type=IMAGE)
@click.option("--from", "source", type=LOCAL_PATH, required=True, help="A tar or a directory with a root filesystem.")
@click.option("--kernel-ref", type=KERNEL, default=None, help="Kernel that VMs of this image boot.")
@click.option("--force", is_flag=True, help="Replace a local image of that name.")
@json_option
def import_image(name: str, source: str, kernel_ref: str | None, force: bool, as_json: bool) -> None:
    """Make an image from a tar or a directory of this host."""
    request = m.ImageImport(name=name, source=source, kernel_ref=kernel_ref or "", force=force)
    with Display() as display:
        image = ensure_daemon().call(op.IMAGE_IMPORT, request, display.reporter(f"importing {name}"))
    print_arrived(image, as_json, "imported")


@click.command(
    cls=Command,
    epilog="""
    banger image register mine --rootfs rootfs.ext4 --kernel-ref NAME
    banger image register mine --rootfs rootfs.squashfs --kernel vmlinux --modules lib/modules/6.12.0
    """,
)
@click.argument("name", type=IMAGE)
@click.option("--rootfs", type=LOCAL_PATH, required=True, help="A file with an ext4 or squashfs root filesystem.")
@click.option("--work-seed", type=LOCAL_PATH, default=None, help="An ext4 disk that home disks start from.")
@click.option("--kernel-ref", type=KERNEL, default=None, help="Installed kernel that VMs of this image boot.")
@click.option("--kernel", type=LOCAL_PATH, default=None, help="A kernel file instead, for this image alone.")
@click.option("--initrd", type=LOCAL_PATH, default=None, help="The initrd that belongs to --kernel.")
@click.option("--modules", type=LOCAL_PATH, default=None, help="The lib/modules/VERSION that belongs to --kernel.")
@click.option("--force", is_flag=True, help="Replace a local image of that name.")
@json_option
def register(
    name: str,
    rootfs: str,
    work_seed: str | None,
    kernel_ref: str | None,
    kernel: str | None,
    initrd: str | None,
    modules: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Make an image of a file of this host, which is not copied: it must stay where it is, unchanged.

    VMs get copies of it, which cost no space where the filesystem can share them (btrfs, XFS).
    """
    if kernel_ref and (kernel or initrd or modules):
        raise UsageFault("--kernel-ref excludes --kernel, --initrd and --modules", "use one kernel or the other")
    if not kernel_ref and not kernel:
        raise UsageFault(
            "--initrd and --modules belong to --kernel" if initrd or modules else "the image needs a kernel",
            "add --kernel-ref NAME (see 'banger kernel list') or --kernel PATH",
        )
    request = m.ImageRegister(
        name=name,
        rootfs=rootfs,
        work_seed=work_seed or "",
        kernel_ref=kernel_ref or "",
        kernel=kernel or "",
        initrd=initrd or "",
        modules=modules or "",
        force=force,
    )
    with Display() as display:
        image = ensure_daemon().call(op.IMAGE_REGISTER, request, display.reporter(f"registering {name}"))
    print_arrived(image, as_json, "registered")


@click.command("rm", cls=Command, epilog="banger image rm NAME OTHER")
@click.argument("names", type=IMAGE, nargs=-1, required=True)
@click.option("--force", is_flag=True, help="Also when VMs use it; they keep their own copies.")
@json_option
def remove(names: tuple[str, ...], force: bool, as_json: bool) -> int:
    """Remove local images that no VM uses. The files of registered images stay where they are."""
    client = ensure_daemon()

    def delete(name: str) -> m.NameRequest:
        client.call(op.IMAGE_DELETE, m.ImageDelete(name, force))
        return m.NameRequest(name)

    return for_each(names, delete, lambda name, _: f"removed {name}", as_json)


def print_arrived(image: m.ImageInfo, as_json: bool, verb: str) -> None:
    """Tell that an image is there now."""
    if as_json:
        print_json(image)
    else:
        kind = f"{image.distro} {image.arch}".strip()
        print(plain(f"{verb} {image.name}: {kind}, {human_size(image.size_bytes)}"))
