"""Secure aggregation: the server learns sums over the round's clients and nothing of any one.

    terms.py      what a round's members agree on: shares, threshold, quantisation
    vector.py     a client's update as one vector of integers, and a sum of them as uploads
    masking.py    keys, shares, encryption and masks, on Flower's primitives
    member.py     a client's four stages, and its secrets between them
    rounds.py     the server's four stages
    rules.py      what cannot be summed, said before anything is sent

SecAgg+: Bell et al., "Secure Single-Server Aggregation with (Poly)Logarithmic Overhead", CCS 2020,
https://eprint.iacr.org/2020/704, after Bonawitz et al., "Practical Secure Aggregation for
Privacy-Preserving Machine Learning", CCS 2017, https://eprint.iacr.org/2017/281. Flower's own
workflow of it is for its legacy API; the stages are the same and the messages ours.

    train.secagg_setup      two fresh public keys
    train.secagg_share      encrypted shares of the own mask's seed and of a private key
    train.secagg_collect    trains; the masked vector
    train.secagg_unmask     shares: of the seed of who answered, of the key of who did not
"""
