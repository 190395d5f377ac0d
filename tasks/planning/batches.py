"""Which images the batches of an update have, and the rows of their forwards, from params alone."""

from tasks.params.run_params import RunParams


def update_batches(params: RunParams) -> list[range]:
    """Return the images of each batch of a pass of the update, counted through the round."""
    total, size = params.images_per_round, params.update.batch_size
    return [range(at, min(at + size, total)) for at in range(0, total, size)]


def groups_in(params: RunParams, images: range) -> int:
    """Return of how many groups consecutive images of a round are."""
    members = params.rollout.num_images_per_prompt
    return images[-1] // members - images[0] // members + 1


def rows_of_a_policy(params: RunParams, images: range) -> int:
    """Return the rows of one policy's forwards in a batch of the update.

    With a shared trunk a window's first step has a row for each group, not for each image.
    """
    steps = params.rl.forwards_per_image(params.rollout.num_inference_steps)
    if not params.rollout.shared_trunk:
        return steps * len(images)
    return (steps - 1) * len(images) + groups_in(params, images)


def largest_forward(params: RunParams) -> int:
    """Return the most rows that a forward of the update has at once.

    A batch may begin and end within a group, as it does where an image before it had no score.
    """
    steps = params.rl.forwards_per_image(params.rollout.num_inference_steps)
    size, members = params.update.batch_size, params.rollout.num_images_per_prompt
    if not params.rollout.shared_trunk or steps > 1:
        return size
    return max(min(size, -(-size // members) + 1), params.rl.background_rows_of(size))
