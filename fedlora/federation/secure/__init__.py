"""Secure aggregation: the server learns sums over the round's clients and nothing of any one.

    terms.py      what a round's members agree on: shares, threshold, quantisation
    agreement.py  all that they agree on, in one digest
    signing.py    what they sign, and whose signature is believed
    vector.py     a client's update as one vector of integers, and a sum of them as uploads
    masking.py    keys, shares, encryption and masks, on Flower's primitives
    rules.py      what cannot be summed, said before anything is sent

A client's part is client/secure_client.py, the server's server/secure_rounds.py.

SecAgg+: Bell et al., "Secure Single-Server Aggregation with (Poly)Logarithmic Overhead", CCS 2020,
https://eprint.iacr.org/2020/704, after Bonawitz et al., "Practical Secure Aggregation for
Privacy-Preserving Machine Learning", CCS 2017, https://eprint.iacr.org/2017/281, whose round of
consistency is here where all clients are neighbours. Flower's own workflow of it is for its legacy
API; the stages are the same but for that one, and the messages ours.

    train.secagg_setup      what all are to agree on; two fresh public keys, signed with it
    train.secagg_share      encrypted shares of the own mask's seed and of a private key
    train.secagg_collect    trains; the masked vector
    train.secagg_agree      a signature under whose updates are in the sum
    train.secagg_unmask     shares: of the seed of who is in it, of the key of who is not
"""
