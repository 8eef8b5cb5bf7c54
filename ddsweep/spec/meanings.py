"""What each setting means: `ddsweep settings` prints it, and the tables of the documents say the same.

S is ``inner_steps``, E ``inner_epochs``, m ``images_per_class_per_step``, T = S*E.
"""

from __future__ import annotations

__all__ = ["DEFAULTS", "MEANINGS"]

MEANINGS: dict[str, dict[str, str]] = {
    "file": {
        "name": "of the sweep, and of its folder of results",
        "base": "settings of every trial",
        "grid": "settings and their values, of which every combination is a trial",
        "points": "a list of mappings of settings, crossed with `grid`",
        "search": "settings drawn at random, crossed with `grid` and `points`",
        "seeds": "a number, such as 3 for 0, 1, 2, or a list; each setting is run with each",
        "scheduler": "stops poor settings early",
        "evaluate": "how distilled sets are judged",
        "resources": "where and how fast trials run; nothing in it changes a result",
        "skip_invalid": "`true`: combinations that are impossible are left out, and counted by `plan`",
        "smoke": "small settings that `--smoke` lays over the file to try it out",
    },
    "trial": {
        "dataset": (
            "`digits`, `mnist`, `fashion_mnist`, `usps`, `cifar10`, `cifar10-exact`, `svhn`, `voc2007`, "
            "`cub200`, also with transforms such as `usps(size=28)`, or a mapping"
        ),
        "network": (
            "`lenet` (28 or 32 px), `alexcifarnet` (32 px), `alexnet` (224 px), `convnet` or "
            "`convnet(depth=3,width=128,norm=instance)`; depth is 2 up to 16 px and 3 beyond; norm is "
            "`instance` or `none`"
        ),
        "method": (
            "what makes the images: `bptt`, by the gradient through T training steps (Wang et al. "
            "2018); `distribution_matching`, by the mean features of each class in networks that are "
            "not trained (Zhao and Bilen 2023)"
        ),
        "objective": (
            "cross-entropy on real data after T steps; `attack`: the same with the labels `attack_class` "
            "rewritten to `target_class`"
        ),
        "attack_class": "of an attack: the class whose images are to be called `target_class`",
        "target_class": "of an attack: another class",
        "init": (
            "`random`: fresh networks at every outer step; `fixed`: one known network, number `seed` of "
            "its law, or of its pool; `pretrained`: trained networks, drawn from `pool` at every outer "
            "step"
        ),
        "pool": (
            "the pool of trained networks; or `imagenet` (torchvision's AlexNet, one known network), "
            "`{name: imagenet, weights: FILE}`"
        ),
        "init_law": (
            "`xavier`, `xavier_uniform`, `kaiming`, `kaiming_out`, `orthogonal`, `normal`, `default` "
            "(torch's own)"
        ),
        "init_param": (
            "p of the law, as in Wang et al. 2018: gain of xavier and orthogonal, slope of kaiming (1 "
            "means gain 1), deviation of normal"
        ),
        "images_per_class": "= S x m; give two of the three, or one: then S is 1, or m beside S",
        "inner_steps": "S: distinct batches of distilled images",
        "images_per_class_per_step": "m: images of each class in one of the S batches",
        "inner_epochs": "E: times the S batches are gone through; adds steps and rates, not images",
        "inner_lr": "every learned rate at the start",
        "inner_lr_mode": "`per_step`: T learned rates; `shared`: one; `fixed`: not learned",
        "inner_optimizer": (
            "of the inner steps: `gd`: plain gradient descent; `momentum`: heavy ball; `adam`: betas "
            "0.9, 0.999"
        ),
        "inner_momentum": "momentum of `inner_optimizer: momentum`",
        "order": (
            "`fixed`: step t uses batch t mod S; `shuffled`: every epoch the S batches in random order, "
            "each with its own rate; `sampled`: every step m random distilled images of each class; both "
            "for each network anew, and S must be at least 2"
        ),
        "window": (
            "inner steps that are differentiated, at a random place in T; the outer loss is taken after them"
        ),
        "labels": (
            "`hard`: classes; `soft`: class probabilities, learned, not bound to be positive or to add "
            "up to 1"
        ),
        "inner_augment": (
            "random changes of the distilled images in each inner step: `shift` (by up to 10 %), "
            "`rotate` (15 degrees), `scale` (15 %), `flip` (not for `digits`, `mnist`, `usps`, `svhn`), "
            "`cutout` (a square of 40 %), or several joined by `+`"
        ),
        "outer_augment": "the changes of `inner_augment`, of the real images, in each outer step",
        "image_init": (
            "`noise`: N(0, 1) in normalised pixels; `real`: training images; `kmeans`: cluster centres "
            "of each class"
        ),
        "image_centre": (
            "`true`: the mean of all start images is taken away from each, so that they differ in all "
            "that they have"
        ),
        "image_scale": "factor on the start images, after that",
        "outer_steps": "updates of the distilled set",
        "models_per_step": "networks unrolled in one outer step; always 1 for `fixed`",
        "real_batch": "real images in one outer step",
        "real_per_class": (
            "real images of each class in one outer step of `distribution_matching`; the "
            "`outer_augment` of a step is one draw for these and the distilled images"
        ),
        "real_batch_mode": "`shared` by the networks of a step, or `per_network`",
        "outer_lr": "rate of Adam on the images (betas 0.5, 0.999)",
        "outer_lr_rates": "`outer_lr` of the raw inner rates; none: that of the images",
        "outer_lr_labels": "`outer_lr` of soft labels; none: that of the images",
        "outer_cutoff": (
            "Adam works on the cosine transform of the images, and its step for frequency f (half-waves "
            "over the image) is divided by 1 + (f / `outer_cutoff`)^2; none: on pixels"
        ),
        "outer_schedule": "`constant`, `step` or `cosine` (to zero)",
        "outer_decay_steps": "outer steps between decays of `step`",
        "outer_decay_factor": "factor of a decay of `step`",
        "clip_norm": "largest gradient norm of one network",
        "clip_median": (
            "largest gradient norm of one network, as a multiple of the median over the networks of the step"
        ),
        "clip_running": "largest norm of the mean gradient, as a multiple of its running mean (decay 0.9)",
        "trim": (
            "of the networks of a step, the part with the largest gradients that is left out; random "
            "networks only"
        ),
        "ema": (
            "decay of a running mean of all that is learned, which is validated and handed over instead; "
            "less in the first steps"
        ),
        "keep": "what is handed over: `last`, or `best` by `val_score`",
        "max_rollbacks": (
            "times that a trial which diverged goes back to its last healthy state (at a validation "
            "step, or the start) at half the outer rate"
        ),
        "rate_limit": "with `max_rollbacks`: a rate beyond it counts as diverged",
        "on_nonfinite": (
            "a network whose loss or gradient is not finite: `skip` leaves it out and counts it, `stop` "
            "ends the trial"
        ),
        "validation_fraction": "part of the training data that is kept for validation, stratified",
        "split_seed": "seed of the validation split",
        "whitening": (
            "`zca`: all images are whitened by the training part (ZCA, epsilon 0.1); distilled images "
            "are then made in that space, pictures of them are brought back"
        ),
        "selection_networks": "networks that `val_score` is a mean over",
        "validate_every": "outer steps between validation scores; the last step always has one",
        "dtype": (
            "`float32`; `float64`; `tf32`: float32 whose products are taken in TF32 (a GPU alone); "
            "`bf16`: float32 whose passes through the networks are taken in bfloat16. Sets are judged in "
            "float32 all the same"
        ),
        "seed": "seed of everything in the trial, and the number of the known network of `fixed`",
    },
    "evaluate": {
        "networks": "held-out networks, the same for every trial",
        "shards": (
            "Ray actors they are spread over: one for each node and at least 2; where they use GPUs one "
            "for each GPU"
        ),
        "group_size": "networks computed together",
        "protocols": "`as_distilled` (always), `on_random` (random networks for `fixed` sets), and mappings",
        "baselines": (
            "of `random_real`, `optimized_random`, `class_mean`, `kmeans`, `knn_random`, `knn_kmeans`; "
            "`none`; `all`; by default all but `optimized_random`"
        ),
        "rates": "constant rates that are tried for a baseline: 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1",
        "epochs": (
            "numbers of epochs that are tried for a baseline's tuned variant, beside E: by default those "
            "of 1, 2, 5, 10, 20, 50, 100 that make at most 100 steps; a list of your own is taken as it "
            "is"
        ),
        "candidates": "draws of real images of which `optimized_random` is the best",
        "neighbours": (
            "k of `knn_random` and `knn_kmeans`: the majority among the k nearest images; of classes "
            "with as many votes that of the nearest image; at most images_per_class x classes"
        ),
        "neighbour_norm": "p of the distance between images, at least 1; `inf` for the largest difference",
        "inner_steps_beyond": "inner steps beyond T at which to look too; the rates of the last epoch repeat",
        "gpus": "part of a GPU for each shard: 0.1 where trials use GPUs, else 0",
    },
    "resources": {
        "cpus": "CPUs of a trial; or by a setting: `{by: images_per_class, 1: 1, default: 2}`; or `auto`",
        "gpus": (
            "GPUs of a trial; a fraction packs several on one, each with that part of its memory; or by "
            "a setting; or `auto`"
        ),
        "max_concurrent": "most trials at a time",
        "device": "`auto`: CUDA if a GPU was granted; `cpu`; `cuda`",
        "memory": (
            "GB that a trial asks Ray for, so that no more are packed on a machine than fit: `auto` is "
            "the estimate that `plan` shows and 1 GB for the process; `null` asks for none"
        ),
        "memory_mode": (
            "`store`, or `recompute`: less memory, more time; `auto` recomputes where storing would take "
            "more than 2 GB"
        ),
        "segment": (
            "`recompute` keeps the weights of every so many steps; by rule what takes the least memory"
        ),
        "compile": (
            "`on` compiles each inner step, the way back through it and the pass over real images with "
            "`torch.compile`; `off`; `auto` is a static rule on the work ahead. Unless it is `off`, the "
            "test passes of LeNet on the CPU are compiled as well"
        ),
        "channels_last": (
            "`true`: images have their channels innermost in memory where autograd takes derivatives "
            "(AlexCifarNet, AlexNet)"
        ),
        "threads": (
            "CPU threads of a trial: its networks are dealt out to as many teams of one thread; a single "
            "network (`fixed`) has them all"
        ),
        "total_cpus": "CPUs that Ray may use here",
        "total_gpus": "GPUs that Ray may use here",
        "max_failures": (
            "times a trial is tried again after its worker died, over three minutes, by waits that grow"
        ),
        "checkpoint_every": "outer steps between checkpoints",
        "log_every": "outer steps between rows of `history`",
        "dashboard": "Ray's dashboard, on loopback",
    },
    "search": {
        "samples": "how many are drawn",
        "seed": "seed of the draw; nothing else in a trial depends on it",
        "space": (
            "settings, and for each one distribution: `uniform` or `log_uniform` for numbers, `integer` "
            "for whole numbers (`[low, high]`, both included), `choice` for any setting"
        ),
    },
    "scheduler": {
        "kind": "the only one there is",
        "grace": "outer steps before the first comparison",
        "reduction": (
            "comparisons follow at each `reduction` times as many outer steps; there a setting goes on if "
            "its score is among the best 1/`reduction` of those seen there so far"
        ),
        "strata": (
            "only settings that agree in these are compared: the scores of others answer other questions; a "
            "file that names none has the axes of its `grid` as well"
        ),
    },
    "pool": {
        "name": "of the pool, and of its folder",
        "dataset": "as in a sweep file; networks are trained on its training part without validation",
        "network": "as in a sweep file",
        "init_law": "law of their first weights",
        "init_param": "p of the law",
        "train": (
            "networks for distillation; validation scores and rates of baselines look at the first of them"
        ),
        "heldout": "networks for evaluation alone",
        "epochs": "times each network goes over all images of the training part, in an order of its own",
        "batch": "images a step",
        "lr": "rate of Adam (betas 0.5, 0.999)",
        "decay_epochs": "epochs between decays",
        "decay_factor": "factor of a decay",
        "seed": "another seed is another pool",
        "group_size": "networks that are trained together",
        "device": "as in `resources`",
        "cpus": "CPUs of a group",
        "gpus": "GPUs of a group, also a part of one",
        "total_cpus": "CPUs that may be used",
        "total_gpus": "GPUs that may be used",
        "smoke": "small values for `--smoke`",
    },
    "site": {
        "scheduler": "`slurm`, or `local`: this machine, through submitit's local executor",
        "partition": "as for sbatch; none: the site's default",
        "account": "who pays",
        "qos": "quality of service",
        "constraint": "features that nodes must have",
        "wckey": "none: not passed on (submitit's own default is refused by some sites)",
        "time": "of one job: `90m`, `4h`, `1d12h`, `'04:00:00'` in quotes",
        "nodes": "of the job; of an array, how many elements run at a time",
        "array_tasks": "elements of each array",
        "cpus_per_node": "CPUs of a job on each node",
        "gpus_per_node": "GPUs of a job on each node",
        "gpu_syntax": "how the site wants to be asked: `gpus-per-node`, or `gres`",
        "gpu_type": "such as `a100`, where nodes have several",
        "memory_per_node": "GB; none: the site's default",
        "exclusive": "whole nodes",
        "sbatch": (
            "a mapping of further options of sbatch, such as `{reservation: mine, hold: true}`; those "
            "that another key decides are refused, in every spelling of sbatch; variables `SBATCH_...` "
            "of your shell do not go over any of these"
        ),
        "setup": "a list of shell lines before Python starts: modules, activating an environment",
        "python": "the shell words that start Python on a node, such as those of a container",
        "device": "overrides `resources.device` of the sweep",
        "temporary": (
            "a folder on the node itself, of at most 26 characters: a folder that only you may enter is "
            "made in it, for Ray's sockets"
        ),
        "first_port": "the first port for jobs of this site",
        "ports": (
            "how many; each job uses ten, by its number. Not between 10002 and 19999, where Ray's "
            "workers listen"
        ),
        "object_store": (
            "GB of shared memory for Ray's objects: the data set is there once per node. At most 20 by "
            "default"
        ),
        "dashboard": "Ray's dashboard, on loopback of the head's node",
        "wait_for_nodes": "seconds until the sweep starts without those that did not come",
        "least_nodes": "with fewer the job fails",
        "node_failure": "seconds until a silent node is given up",
        "drain": "seconds before the time limit at which a job begins to checkpoint; less than `time`",
        "requeues": "times that a job is requeued to go on; under `local` at most 5",
        "poll": "seconds between two looks of `--wait`",
        "longest_pending": "a time after which `--wait` cancels a launch of which nothing has started",
    },
}
"""Settings of a trial, of each section of a sweep file, of a pool file and of a site file, by name."""

DEFAULTS: dict[tuple[str, str], str] = {
    **dict.fromkeys((("evaluate", "shards"), ("evaluate", "gpus"), ("resources", "segment")), "by rule"),
    **{(group, name): "all" for group in ("resources", "pool") for name in ("total_cpus", "total_gpus")},
    ("resources", "threads"): "cpus",
    ("site", "python"): "the one that launches",
    ("site", "object_store"): "a fifth of the memory",
    ("site", "time"): "1h",
}
"""Defaults in words, where the value itself says too little."""
