// Memory that a thread keeps: to get some megabytes from the system anew costs as much as a small product.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace mmfast {

// Room for elements of a plain type; if it is large, in pages of 2 MiB where the system has them.
template <typename T>
class Kept {
 public:
  // At least so many, of which the contents are not defined.
  T* get(int64_t count) {
    if (count > size_) {
      const size_t bytes = count * sizeof(T), page = bytes < size_t{1} << 20 ? 4096 : size_t{1} << 21;
      const size_t whole = (bytes + page - 1) / page * page;
      memory_.reset();
      size_ = 0;
      memory_.reset(static_cast<T*>(std::aligned_alloc(page, whole)));
      if (!memory_) throw std::bad_alloc();
#if defined(__linux__)
      if (page > 4096) madvise(memory_.get(), whole, MADV_HUGEPAGE);
#endif
      size_ = static_cast<int64_t>(whole / sizeof(T));
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(T* memory) const { std::free(memory); }
  };
  std::unique_ptr<T, Free> memory_;
  int64_t size_ = 0;
};

}  // namespace mmfast
