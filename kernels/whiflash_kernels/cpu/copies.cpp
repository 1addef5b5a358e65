// `propose_copies` of `whiflash_kernels.copies` on a CPU, whose body is its specification.
#include <algorithm>
#include <cstdint>
#include <iterator>

#include "copies.h"

namespace {

struct Match {
    int64_t length, source;
};

// The places that `propose_copies` compares in text t[0:size]: where the last copy goes on, then the newest matches.
std::vector<Match> matches(const int64_t* t, int64_t size, int64_t going_on, int64_t least) {
    const auto matched = [&](int64_t source) {
        int64_t length = 0;
        while (length < std::min<int64_t>(source, MATCH) && t[source - 1 - length] == t[size - 1 - length]) ++length;
        return length >= least ? length : 0;
    };
    std::vector<int64_t> one, two;
    for (int64_t place = size - 1; place > 0 && two.size() < CANDIDATES; --place) {
        if (t[place - 1] != t[size - 1]) continue;
        if (place > 1 && t[place - 2] == t[size - 2]) two.push_back(place);
        if (one.size() < CANDIDATES) one.push_back(place);
    }
    std::vector<Match> found;
    if (going_on > 0 && going_on < size) found.push_back({matched(going_on), going_on});
    for (const int64_t place : two.empty() ? one : two)
        if (place != going_on) found.push_back({matched(place), place});
    found.erase(std::remove_if(found.begin(), found.end(), [](Match each) { return !each.length; }), found.end());
    return found;
}

}  // namespace

// `propose_copies` for `requests` texts, rows `slots` of `tokens` [slots, stride], of `sizes` tokens each, its drafts
// among them. limits: beyond those drafts. before: [requests], each last draft's chance; null: copies go behind the
// text, and `back` is written. The rest as of `propose_copies`; results [requests, width], [requests], zero at the call.
extern "C" void whiflash_propose(
    const int64_t* tokens, int64_t stride, const int64_t* slots, const int64_t* sizes, int64_t* back,
    const int64_t* limits, const float* factors, const float* chances, const int32_t* boundaries, int64_t buckets,
    int64_t requests, int64_t width, float worth, int64_t least, const float* before,
    int64_t* out, int64_t* counts, float* alives, int32_t* agreements, int64_t* lengths
) {
    for (int64_t b = 0; b < requests; ++b) {
        const int64_t size = sizes[b], last = back[slots[b]];
        const int64_t* t = tokens + slots[b] * stride;
        std::vector<Match> places = matches(t, size, last > 0 ? size - last : 0, least);
        if (places.empty()) continue;
        const auto shorter = [](Match one, Match other) { return one.length < other.length; };
        const Match best = *std::max_element(places.begin(), places.end(), shorter);  // the first of equals
        lengths[b] = best.length;
        if (!before) back[slots[b]] = size - best.source;
        float alive = before ? before[b] : 1.0f;
        for (int64_t depth = 0; depth < std::min(limits[b], width); ++depth) {
            const auto following = [&](Match each) { return t[each.source + depth % (size - each.source)]; };
            const int64_t token = following(best);
            int64_t with = 0, without = 0;
            const bool single = places.size() == 1;
            for (const Match each : places) {
                int64_t& side = following(each) == token ? with : without;
                side = std::max(side, each.length);
            }
            const int agreed = !without ? (single ? ALONE : UNANIMOUS) : with > without ? LEADING : CONTESTED;
            const auto parted = [&](Match each) { return following(each) != token; };
            const int32_t* bucket = std::upper_bound(boundaries, boundaries + buckets, best.length + depth);
            const int64_t row = std::max<int64_t>(bucket - boundaries - 1, 0);
            const float known = chances[(b * buckets + row) * KINDS + agreed];
            alive *= std::min(depth ? known : known * factors[b], float(SURE));
            if (token < 0 || ((depth || before) && !(alive >= worth))) break;
            const int64_t at = b * width + depth;
            out[at] = token, alives[at] = alive, agreements[at] = agreed;
            ++counts[b];
            places.erase(std::remove_if(places.begin(), places.end(), parted), places.end());
        }
    }
}
