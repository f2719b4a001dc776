"""Differential privacy: per-example gradients, noise, accounting, ledgers, and attacks on them.

    per_example.py   each example's own gradient, through PEFT's extension point
    mechanism.py     clip, sum, noise
    chance.py        Gaussian noise and sampling from AES-CTR, keyed by the operating system
    accounting.py    epsilon of steps taken; the noise that a budget needs
    ledger.py        what was spent, in a file that outlives the process and every run
    charges.py       its lines and their chain; ledger_before.py: those of the earlier format
    units.py         whose rows a charge is for
    keeper.py        a ledger that another process keeps; keeper_socket.py: how it is asked
    training.py      the local loop under example-level DP
    central.py       client-level DP at the server
    probe.py         are a model's examples kept apart? measured before training
    audit.py         a lower bound on epsilon, from canaries
    inversion.py     the text in one update
    summary.py       what a run's records say; statement.py: what a ledger says
    delta.py         whether delta promises anything; what else cannot be: preflight/privacy.py

Imports point down this list's dependencies only; nothing here knows of Flower.
"""
