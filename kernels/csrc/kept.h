// Memory for the kernels of one file.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace longvid {

// Memory, at 64 bytes, that the calling thread keeps from call to call unless it is more than MOST bytes: to touch new pages
// takes as long as many a kernel. Each Owner has its own, one at a time.
template <typename Owner, size_t MOST>
class Kept {
  public:
    explicit Kept(size_t size) {
        if (size <= size_) return;
        size_ = 0;
        memory_ = nullptr;
        memory_.reset(new (std::align_val_t(64), std::nothrow) uint8_t[size]);
        if (memory_) size_ = size;
    }
    ~Kept() {
        if (size_ <= MOST) return;
        memory_ = nullptr;
        size_ = 0;
    }
    Kept(const Kept &) = delete;
    uint8_t *get() const { return memory_.get(); }  // null: there was none

  private:
    struct Free {
        void operator()(uint8_t *memory) const { ::operator delete[](memory, std::align_val_t(64)); }
    };
    static thread_local inline std::unique_ptr<uint8_t[], Free> memory_;
    static thread_local inline size_t size_ = 0;
};

}  // namespace longvid
