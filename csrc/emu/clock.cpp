// SPDX-License-Identifier: Apache-2.0
#include "emu/clock.hpp"

#include <algorithm>

namespace deepcomm::emu {

std::vector<Clock::Node*>& Clock::free_nodes() {
    // Clocks come and go at every strong operation. Never destroyed: static clocks end later.
    static auto* nodes = new std::vector<Node*>;
    return *nodes;
}

Clock::Node* Clock::new_node() {
    std::vector<Node*>& nodes = free_nodes();
    if (nodes.empty()) return new Node{1, {}};
    Node* node = nodes.back();
    nodes.pop_back();
    node->num_owners = 1;
    return node;
}

void Clock::release() {
    if (node_ && --node_->num_owners == 0) free_nodes().push_back(node_);
    node_ = nullptr;
}

std::vector<uint32_t>& Clock::writable(size_t min_size) {
    if (!node_) {
        node_ = new_node();
        node_->epochs.clear();
    } else if (node_->num_owners > 1) {
        Node* copy = new_node();
        copy->epochs = node_->epochs;
        --node_->num_owners;
        node_ = copy;
    }
    if (node_->epochs.size() < min_size) node_->epochs.resize(min_size, 0);
    return node_->epochs;
}

void Clock::raise(size_t index, uint32_t epoch) {
    if ((*this)[index] >= epoch) return;
    writable(index + 1)[index] = epoch;
}

void Clock::join(const Clock& other) {
    if (!other.node_ || other.node_ == node_) return;
    if (!node_) {
        *this = other;
        return;
    }
    const std::vector<uint32_t>& from = other.node_->epochs;
    std::vector<uint32_t>& into = writable(from.size());
    uint32_t* target = into.data();
    const uint32_t* source = from.data();
    for (size_t i = 0; i < from.size(); ++i) target[i] = std::max(target[i], source[i]);
}

}  // namespace deepcomm::emu
