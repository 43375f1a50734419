"""A built-in dataset with known factors: lit rooms with one object, ray-cast on demand.

The image is linear in the three material colours once the geometry is fixed, so each of the 480 geometries (scale,
shape, orientation) is ray-cast once into four light maps, and the thousand hue combinations of it are only coloured.
"""

from __future__ import annotations

import colorsys
from typing import Any

import numpy as np
import torch
from torch import Tensor

from multibeta.data.dataset import Indices
from multibeta.data.factors import FactorGrid
from multibeta.data.images import as_indices

SHAPES = ("cube", "cylinder", "sphere", "cone")

# Objects of scale 1 rest on z = 0, centred on the vertical axis.
CUBE_HALF = 0.43
CYLINDER_RADIUS, CYLINDER_HEIGHT = 0.45, 1.0
SPHERE_RADIUS = 0.54
CONE_RADIUS, CONE_HEIGHT = 0.62, 1.2
BOUND_CENTRE, BOUND_RADIUS = 0.5, 0.82

SCALES = np.linspace(1.15, 2.4, 8)
AZIMUTHS = np.radians(np.linspace(-30, 30, 15))

# The room is x < ROOM, y < ROOM, z > 0; the camera circles the object and faces the corner at azimuth 0.
ROOM = 2.8
CAMERA_DISTANCE, CAMERA_HEIGHT, TARGET_HEIGHT = 7.0, 3.7, 0.95
TANGENT_OF_HALF_VIEW = 0.36

# The sun stands next to the camera at every azimuth, so the shadow always shows; a weak fill light opens the dark faces.
LIGHT = np.array([-0.95, 0.3, 1.25]) / np.linalg.norm([-0.95, 0.3, 1.25])
FILL = np.array([-0.1, -1.0, 0.4]) / np.linalg.norm([-0.1, -1.0, 0.4])
LIGHT_RADIUS = 0.11
LIGHT_SAMPLES = 24
AMBIENT, DIRECT, FILLING = 0.40, 0.72, 0.13
HIGHLIGHT, SHININESS = 0.45, 45

# Saturation and value differ per material: equal hues remain three visible surfaces.
FLOOR_TONE, WALL_TONE, OBJECT_TONE = (0.62, 0.88), (0.48, 0.97), (0.88, 1.0)
NUM_HUES = 10
WARM_HUES = (8, 9, 0, 1, 2)  # magenta over red to yellow: half of the circle

MAPS_LIMIT_BYTES = 2**30


class Scenes(FactorGrid):
    """480,000 rendered rooms with six independent factors, after the factors of 3D Shapes.

    The last factor varies fastest: `index = factors . bases`. Orientation is the azimuth of the camera, from -30 to 30
    degrees: it moves the walls, the object's faces and the shadow together. An image depends on its index and the
    resolution alone.

    Args:
        resolution: Pixels per side, 8 to 1024.
    """

    channels = 3
    factor_names = ("floor_hue", "wall_hue", "object_hue", "scale", "shape", "orientation")
    factor_sizes = (NUM_HUES, NUM_HUES, NUM_HUES, len(SCALES), len(SHAPES), len(AZIMUTHS))
    attribute_names = ("warm_floor", "warm_wall", "warm_object", "large", *SHAPES, "turned_right")

    def __init__(self, resolution: int = 32):
        if not isinstance(resolution, int) or not 8 <= resolution <= 1024:
            raise ValueError(f"resolution must be an integer in [8, 1024], got {resolution!r}")
        self.resolution = resolution
        self._maps = {}
        self._maps_limit = max(1, MAPS_LIMIT_BYTES // (16 * resolution**2))
        self._colours = [_hue_circle(*tone) for tone in (FLOOR_TONE, WALL_TONE, OBJECT_TONE)]

    def attributes(self, indices: Indices) -> Tensor:
        """Yes or no to every one of `attribute_names` at `indices`, bool, (N, A): statements about the factors.

        Warm hues run from magenta over red to yellow, large is the upper half of the scales, right a positive azimuth.
        """
        factors = self.factors(indices)
        hues, scale, shape, orientation = factors[:, :3], factors[:, 3:4], factors[:, 4:5], factors[:, 5:]
        warm = torch.isin(hues, torch.tensor(WARM_HUES))
        shapes = shape == torch.arange(len(SHAPES))
        return torch.cat([warm, scale >= len(SCALES) // 2, shapes, orientation > len(AZIMUTHS) // 2], 1)

    def images(self, indices: Indices) -> Tensor:
        """Images at `indices`, uint8, (N, 3, resolution, resolution)."""
        array = as_indices(indices, len(self))
        floor, wall, thing, *geometry = np.unravel_index(array, self.factor_sizes)
        floor, wall, thing = (table[hue] for table, hue in zip(self._colours, (floor, wall, thing), strict=True))
        geometry = np.ravel_multi_index(geometry, self.factor_sizes[3:])
        images = np.empty((len(array), 3, self.resolution, self.resolution), dtype=np.uint8)
        for value in np.unique(geometry):
            rows = np.flatnonzero(geometry == value)
            maps = self._light_maps(int(value))
            # Elementwise, not a matrix product: its rounding would depend on the batch an image is rendered in.
            light = floor[rows] * maps[0]
            light += wall[rows] * maps[1]
            light += thing[rows] * maps[2]
            light += maps[3]
            images[rows] = _display(light)
        return torch.from_numpy(images)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": {}}  # another process renders its own

    def _light_maps(self, geometry: int) -> np.ndarray:
        """Light maps of one geometry, rendered on first use; the oldest are dropped beyond the memory limit."""
        maps = self._maps.get(geometry)  # other threads may add and drop some meanwhile
        if maps is None:
            scale, shape, orientation = np.unravel_index(geometry, self.factor_sizes[3:])
            maps = light_maps(self.resolution, SCALES[scale], SHAPES[shape], AZIMUTHS[orientation])
            for oldest in list(self._maps)[: max(0, len(self._maps) + 1 - self._maps_limit)]:
                self._maps.pop(oldest, None)
            self._maps[geometry] = maps
        return maps


def light_maps(resolution: int, scale: float, shape: str, azimuth: float) -> np.ndarray:
    """Linear light per pixel by the material that sends it: floor, wall, object, and the white highlight.

    Coverage and shading are averaged over a regular grid of rays per pixel in linear light, where colours are blended
    too, so that colouring the maps equals rendering the coloured scene.

    Returns:
        float32, (4, resolution, resolution).
    """
    rays_per_side = min(4, max(2, -(-192 // resolution)))
    origin, direction = _camera_rays(resolution * rays_per_side, azimuth)
    light = np.zeros((4, len(direction)))

    room_distance, room_normal = _hit_room(origin, direction)
    distance = _hit_object(shape, scale, np.broadcast_to(origin, direction.shape), direction)
    on_object = distance < room_distance

    point = origin + direction * room_distance[:, None]
    room_light = np.zeros(len(direction))
    seen = ~on_object
    room_light[seen] = _light_of_room(shape, scale, point[seen], room_normal[seen])
    on_floor = room_normal[:, 2] > 0
    light[0] = np.where(on_floor, room_light, 0)
    light[1] = np.where(on_floor, 0, room_light)

    view = direction[on_object]
    point = origin + view * distance[on_object, None]
    light[2, on_object], light[3, on_object] = _light_of_object(_normal(shape, point / scale), -view)

    light = light.reshape(4, resolution, rays_per_side, resolution, rays_per_side)
    return light.mean(axis=(2, 4)).astype(np.float32)


def _hue_circle(saturation: float, value: float) -> np.ndarray:
    """Linear colours of evenly spaced hues, float32, (NUM_HUES, 3, 1, 1)."""
    colours = [colorsys.hsv_to_rgb(hue / NUM_HUES, saturation, value) for hue in range(NUM_HUES)]
    return np.square(np.array(colours, dtype=np.float32)).reshape(NUM_HUES, 3, 1, 1)


def _display(light: np.ndarray) -> np.ndarray:
    """Linear light to bytes with a display gamma of 2, written over `light`."""
    np.minimum(light, 1, out=light)
    np.sqrt(light, out=light)
    light *= 255
    light += 0.5
    return light.astype(np.uint8)


def _camera_rays(side: int, azimuth: float) -> tuple[np.ndarray, np.ndarray]:
    """Camera position, (3,), and unit ray directions row by row, (side * side, 3)."""
    heading = np.pi / 4 + azimuth
    origin = np.array([-CAMERA_DISTANCE * np.cos(heading), -CAMERA_DISTANCE * np.sin(heading), CAMERA_HEIGHT])
    forward = np.array([0, 0, TARGET_HEIGHT]) - origin
    forward /= np.linalg.norm(forward)
    right = np.array([np.sin(heading), -np.cos(heading), 0])
    up = np.cross(right, forward)
    offset = (2 * (np.arange(side) + 0.5) / side - 1) * TANGENT_OF_HALF_VIEW
    down, across = np.meshgrid(offset, offset, indexing="ij")
    direction = forward + across[..., None] * right - down[..., None] * up
    direction /= np.linalg.norm(direction, axis=-1, keepdims=True)
    return origin, direction.reshape(-1, 3)


def _hit_room(origin: np.ndarray, direction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distance to the nearest of floor and walls, (R,), and its normal, (R, 3)."""
    with np.errstate(divide="ignore"):
        distance = np.stack(
            [
                np.where(direction[:, 0] > 0, (ROOM - origin[0]) / direction[:, 0], np.inf),
                np.where(direction[:, 1] > 0, (ROOM - origin[1]) / direction[:, 1], np.inf),
                np.where(direction[:, 2] < 0, -origin[2] / direction[:, 2], np.inf),
            ]
        )
    nearest = distance.argmin(axis=0)
    return distance.min(axis=0), np.diag([-1.0, -1.0, 1.0])[nearest]


def _hit_object(shape: str, scale: float, origin: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """Distance along each ray to the object, (R,), infinite where it misses.

    Only rays that meet the bounding sphere are tested further. The underside is never reached: the camera looks down
    and the light stands above.
    """
    centre = np.array([0, 0, BOUND_CENTRE * scale])
    towards = centre - origin
    along = np.einsum("rd,rd->r", towards, direction)
    squared_distance = np.einsum("rd,rd->r", towards, towards) - along**2
    near = np.flatnonzero((along > 0) & (squared_distance < (BOUND_RADIUS * scale) ** 2))
    distance = np.full(len(origin), np.inf)
    distance[near] = _INTERSECTIONS[shape](origin[near] / scale, direction[near] / scale)
    return distance


def _hit_cube(origin: np.ndarray, direction: np.ndarray) -> np.ndarray:
    low = np.array([-CUBE_HALF, -CUBE_HALF, 0])
    high = np.array([CUBE_HALF, CUBE_HALF, 2 * CUBE_HALF])
    with np.errstate(divide="ignore", invalid="ignore"):
        one, other = (low - origin) / direction, (high - origin) / direction
    enter = np.minimum(one, other).max(axis=1)
    leave = np.maximum(one, other).min(axis=1)
    return np.where((enter < leave) & (enter > 0), enter, np.inf)


def _hit_cylinder(origin: np.ndarray, direction: np.ndarray) -> np.ndarray:
    a = (direction[:, :2] ** 2).sum(axis=1)
    b = (origin[:, :2] * direction[:, :2]).sum(axis=1)
    c = (origin[:, :2] ** 2).sum(axis=1) - CYLINDER_RADIUS**2
    side = _first_root(a, b, c, origin, direction, CYLINDER_HEIGHT)
    with np.errstate(divide="ignore"):
        top = (CYLINDER_HEIGHT - origin[:, 2]) / direction[:, 2]
    place = origin[:, :2] + top[:, None] * direction[:, :2]
    on_top = (top > 0) & ((place**2).sum(axis=1) < CYLINDER_RADIUS**2)
    return np.minimum(side, np.where(on_top, top, np.inf))


def _hit_sphere(origin: np.ndarray, direction: np.ndarray) -> np.ndarray:
    origin = origin - np.array([0, 0, SPHERE_RADIUS])
    a = (direction**2).sum(axis=1)
    b = (origin * direction).sum(axis=1)
    c = (origin**2).sum(axis=1) - SPHERE_RADIUS**2
    return _first_root(a, b, c, origin, direction, np.inf)


def _hit_cone(origin: np.ndarray, direction: np.ndarray) -> np.ndarray:
    slope = (CONE_RADIUS / CONE_HEIGHT) ** 2
    height = origin[:, 2] - CONE_HEIGHT
    a = (direction[:, :2] ** 2).sum(axis=1) - slope * direction[:, 2] ** 2
    b = (origin[:, :2] * direction[:, :2]).sum(axis=1) - slope * height * direction[:, 2]
    c = (origin[:, :2] ** 2).sum(axis=1) - slope * height**2
    return _first_root(a, b, c, origin, direction, CONE_HEIGHT)


def _first_root(
    a: np.ndarray, b: np.ndarray, c: np.ndarray, origin: np.ndarray, direction: np.ndarray, height: float
) -> np.ndarray:
    """Smallest t > 0 of a t^2 + 2 b t + c = 0 whose point has z between 0 and `height`; any z if that is infinite."""
    root = np.sqrt(np.where(b * b > a * c, b * b - a * c, np.nan))
    first = np.full(len(a), np.inf)
    with np.errstate(divide="ignore", invalid="ignore"):
        candidates = (-b - root) / a, (-b + root) / a
    for candidate in candidates:
        level = origin[:, 2] + candidate * direction[:, 2]
        inside = np.isinf(height) | ((level >= 0) & (level <= height))
        first = np.where((candidate > 0) & inside, np.fmin(first, candidate), first)
    return first


_INTERSECTIONS = {"cube": _hit_cube, "cylinder": _hit_cylinder, "sphere": _hit_sphere, "cone": _hit_cone}


def _normal(shape: str, point: np.ndarray) -> np.ndarray:
    """Outward unit normals at points of the surface of an object of scale 1, (R, 3)."""
    if shape == "cube":
        offset = point - np.array([0, 0, CUBE_HALF])
        face = np.abs(offset).argmax(axis=1)
        return np.eye(3)[face] * np.sign(offset[np.arange(len(point)), face])[:, None]
    if shape == "sphere":
        return (point - np.array([0, 0, SPHERE_RADIUS])) / SPHERE_RADIUS
    normal = point.copy()
    if shape == "cylinder":
        normal[:, 2] = 0
        normal[point[:, 2] > CYLINDER_HEIGHT - 1e-9] = (0, 0, 1)
    else:
        normal[:, 2] = (CONE_RADIUS / CONE_HEIGHT) ** 2 * (CONE_HEIGHT - point[:, 2])
    return normal / np.linalg.norm(normal, axis=1, keepdims=True)


def _light_of_room(shape: str, scale: float, point: np.ndarray, normal: np.ndarray) -> np.ndarray:
    """Light from floor and walls of unit albedo, (R,): ambient with soft contact shading, and the shadowed sun."""
    open_sky = 1 - 0.5 * np.exp(-2.0 * _distance_to_edges(point)).sum(axis=1)
    towards = np.array([0, 0, SPHERE_RADIUS * scale]) - point
    squared = np.einsum("rd,rd->r", towards, towards)
    facing = np.maximum(np.einsum("rd,rd->r", towards, normal), 0) / np.sqrt(squared)
    # The share of the sky that a ball in the object's place hides from the surface.
    open_sky *= 1 - np.minimum(facing * (SPHERE_RADIUS * scale) ** 2 / squared, 1)
    soft = (AMBIENT + FILLING * np.maximum(normal @ FILL, 0)) * open_sky
    return soft + DIRECT * np.maximum(normal @ LIGHT, 0) * _visible_light(shape, scale, point)


def _distance_to_edges(point: np.ndarray) -> np.ndarray:
    """Distances to the two other planes of the room, smallest first, (R, 2)."""
    planes = np.stack([ROOM - point[:, 0], ROOM - point[:, 1], point[:, 2]], axis=1)
    return np.sort(planes, axis=1)[:, 1:]


def _light_of_object(normal: np.ndarray, view: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Diffuse light of unit albedo and white highlight of the object, each (R,); convex, it never shades itself."""
    diffuse = AMBIENT * (0.7 + 0.3 * normal[:, 2]) + FILLING * np.maximum(normal @ FILL, 0)
    diffuse += DIRECT * np.maximum(normal @ LIGHT, 0)
    half = view + LIGHT
    half /= np.linalg.norm(half, axis=1, keepdims=True)
    highlight = HIGHLIGHT * np.maximum(np.einsum("rd,rd->r", normal, half), 0) ** SHININESS
    return diffuse, highlight


def _visible_light(shape: str, scale: float, point: np.ndarray) -> np.ndarray:
    """Share of a round light that the object leaves visible from each point, (R,), in [0, 1]."""
    side = np.cross(LIGHT, [0, 0, 1])
    side /= np.linalg.norm(side)
    sample = np.arange(LIGHT_SAMPLES) + 0.5
    radius = LIGHT_RADIUS * np.sqrt(sample / LIGHT_SAMPLES)
    angle = sample * np.pi * (3 - np.sqrt(5))
    visible = np.zeros(len(point))
    for x, y in zip(radius * np.cos(angle), radius * np.sin(angle), strict=True):
        direction = LIGHT + x * side + y * np.cross(LIGHT, side)
        direction /= np.linalg.norm(direction)
        visible += np.isinf(_hit_object(shape, scale, point, np.broadcast_to(direction, point.shape)))
    return visible / LIGHT_SAMPLES
